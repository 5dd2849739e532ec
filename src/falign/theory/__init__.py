"""Simulators and theorems of learning without weight transport; nothing here knows of nn.Module."""
