"""How any run goes: its folder, its checkpoints, its loop."""
