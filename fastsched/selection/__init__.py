"""From statistics or a cost to a schedule, without model calls."""
