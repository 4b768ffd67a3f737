"""Readers of files that other tools recorded: each yields a `hooks.recording.Recording`."""
