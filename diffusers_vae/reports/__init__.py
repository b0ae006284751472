"""What people look at: pictures, charts, tables and the HTML report."""
