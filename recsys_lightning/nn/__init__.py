"""Blocks that models are made of: plain `nn.Module`s that know no dataset, no paper and no Lightning."""
