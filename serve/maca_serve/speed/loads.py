"""What the engine is given in one run of a speed measurement."""

from dataclasses import dataclass

# Of the most requests per second that the first checkpoint answered, where no rates are given.
PEAK_SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Load:
    """Requests of one shape: always so many in flight, or so many arriving per second.

    Attributes:
        input_len: random prompt tokens of a request.
        concurrency: requests in flight, the next sent when one is answered; None with a rate.
        rate: requests per second, sent whether the engine keeps up or not; None without.
    """

    input_len: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def level(self) -> str:
        """Its place under its prompt length in results."""
        return str(self.concurrency) if self.rate is None else f"{self.rate:g}"

    def __str__(self) -> str:
        how = "in flight" if self.rate is None else "per second"
        return f"{self.level} {how}, {self.input_len} tokens in"


def rates_of_peak(peak: float) -> list[float]:
    """Rates up to a peak in requests per second, to two digits."""
    return [float(f"{share * peak:.2g}") for share in PEAK_SHARES]
