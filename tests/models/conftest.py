import pytest
import torch


def trace_of(model, batch):
    """Losses of three training steps: what changes a loss, a gradient or a state changes the trace."""
    model.train()
    torch.manual_seed(3)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.3), []
    for _ in range(3):
        terms = model.losses(batch)
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found += [(name, float(term.detach())) for name, term in terms.items()]
    return found


@pytest.fixture
def trace():
    """See `trace_of`."""
    return trace_of
