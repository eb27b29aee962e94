"""The parts of figures and of the report: maps, letters, findings, sections."""
