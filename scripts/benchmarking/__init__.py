"""The benchmark's parts: what is measured (rows), who is measured (peers), and how it is put down (report)."""
