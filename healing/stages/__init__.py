"""The stages put together: one file per stage, pure cells below."""
