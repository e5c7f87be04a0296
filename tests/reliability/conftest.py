import sys
from pathlib import Path

# Processes that are started anew have to find `processes` by its name.
sys.path.insert(0, str(Path(__file__).parent))
