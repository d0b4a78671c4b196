"""The Pareto front: artifacts than which no other is both smaller and nearer to the source."""

from collections.abc import Sequence


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of points (size, divergence) that none other beats, by rising size.

    Of equal points the first counts.
    """
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (*points[place], place)):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front
