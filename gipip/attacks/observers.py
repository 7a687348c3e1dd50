"""Who looks on while an attack runs: the progress bar, and the user."""

from collections.abc import Callable

from torch import Tensor

from gipip.attacks.loop import Course, Observer
from gipip.progress import progress


class Progress(Observer):
    """A progress bar for each course, numbered."""

    def __init__(self, title: str):
        self.title, self.courses = title, 0

    def begin(self, course: Course) -> None:
        self.courses += 1
        title = f"{self.title} {self.courses}"
        self.bar = progress(total=course.iterations, description=title)
        self.bar.update(len(course.history))

    def look(self, course: Course) -> None:
        self.bar.update(1)

    def end(self, course: Course) -> None:
        self.bar.close()


class Watch(Observer):
    """Shows the candidate images and the cost to a function, every so many iterations."""

    def __init__(self, show: Callable[[int, Tensor, float], None], every: int):
        self.show, self.every = show, every

    def look(self, course: Course) -> None:
        if len(course.history) % self.every == 0:
            self.show(len(course.history), course.images(), course.cost.item())
