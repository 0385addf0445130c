"""Operations of torch that are fast on a CPU, for models whose layers are not compiled."""
