"""How much communication was in flight, and how much of it compute had to wait for."""

from megatron_scmoe.overlap.streams import Flight


class ExchangeMeter:
    """Sums the times of the exchanges of one MoE layer, both directions, between two readings."""

    def __init__(self) -> None:
        self._flights: list[Flight] = []

    def add(self, flight: Flight) -> None:
        """Count an exchange that has been waited for."""
        self._flights.append(flight)

    def read(self) -> tuple[float, float]:
        """(in flight, blocked), in seconds, summed over the exchanges since the last reading.

        Synchronizes with the device; call it once an iteration.
        """
        flights, self._flights = self._flights, []
        times = [flight.seconds() for flight in flights]
        return sum(in_flight for in_flight, _ in times), sum(blocked for _, blocked in times)
