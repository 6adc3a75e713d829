"""Studies: arms x seeds x data sets, run side by side and resumable, with tables and plots (``fgd study``)."""
