"""Reports for people: pictures, charts, tables and the HTML report."""
