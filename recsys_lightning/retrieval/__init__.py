"""From scores and vectors to ranked items: beam search and BeamFusion."""
