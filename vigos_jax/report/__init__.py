"""Self-contained HTML pages: charts, a run's page, and the template they share."""
