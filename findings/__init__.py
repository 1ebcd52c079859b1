"""The experiment that docs/findings.md reports, by the protocol of docs/protocol.md."""
