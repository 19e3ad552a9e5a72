"""One HTML page that answers for a resolution and a budget, from the results of all devices."""
