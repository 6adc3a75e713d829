"""What speaks against a teacher, by the one rule that trainings, Distiller and doctor share."""

import copy
import logging

import pytest
import torch
from torch import nn

from fgd_hooks import Distiller
from fgd_hooks.errors import TeacherError
from fgd_hooks.teacher import as_modules, check_apart, doubts
from tests.helpers.tiny import TinyDetector, trained

WIDE = (16, 24, 32)


def test_nothing_speaks_against_a_larger_trained_teacher():
    assert doubts(trained(TinyDetector()), trained(TinyDetector(WIDE), seed=1)) == {}


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "said"),
    [
        (TinyDetector(WIDE), trained(TinyDetector()), "smaller", "swapped"),
        (trained(TinyDetector()), TinyDetector(WIDE), "untrained", "never trained"),
    ],
)
def test_swapped_and_untrained_teachers(student, teacher, kind, said):
    found = doubts(student, teacher)
    assert list(found) == [kind]
    assert said in found[kind][0]


def test_a_teacher_of_the_students_weights_has_nothing_to_teach():
    student = trained(TinyDetector())
    teacher = copy.deepcopy(student).half()
    student.load_state_dict(teacher.state_dict())  # as two models of one file, read in two precisions
    assert list(doubts(student, teacher)) == ["same"]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1e-2)
    assert doubts(student, teacher) == {}


def test_a_model_without_sizes_is_not_judged():
    assert doubts(nn.LazyLinear(4), nn.LazyLinear(4)) == {}


def test_each_doubt_is_said_once_wherever_the_pair_meets(caplog):
    student, teacher = TinyDetector(WIDE), trained(TinyDetector())
    check_apart(student, teacher)
    with caplog.at_level(logging.WARNING), Distiller(student, teacher=teacher, config={"resize": True}):
        pass
    assert caplog.text.count("smaller than the student") == 1


def test_teachers_that_are_no_modules():
    with pytest.raises(TeacherError, match=r"a str \(teacher\.pt\)"):
        Distiller(TinyDetector(), teacher="teacher.pt")
    with pytest.raises(TeacherError, match="NoneType"):
        as_modules([TinyDetector(), None])


def test_a_yolo_object_stands_for_its_model():
    """As Ultralytics' own: a module around the model, whose call predicts."""

    class Yolo(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def add_callback(self, event, function): ...

    student, teacher = TinyDetector(), trained(TinyDetector(WIDE))
    with Distiller(Yolo(student), teacher=Yolo(teacher)) as distiller:
        assert distiller.student is student
        assert distiller.teachers == [teacher]
