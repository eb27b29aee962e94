"""The parts of figures, of the report and of the web page: maps, letters, findings, sections, markup."""
