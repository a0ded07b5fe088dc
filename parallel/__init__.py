"""The distributed runtime: ranks, meshes, exchanges, checkpoints. Knows no routers and no trainer."""
