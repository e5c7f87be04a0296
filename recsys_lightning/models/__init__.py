"""Models, one file a paper: plain `nn.Module`s that train in any loop."""
