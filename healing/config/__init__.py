"""What a user may set: fields, presets, one file per stage, fingerprints; no third-party code."""
