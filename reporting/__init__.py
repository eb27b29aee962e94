"""What figures, report and web page are made of: Grad-CAM, lettering, the report's text, HTML."""
