"""The training loop: batches through the model, the loss, back, and a step; saved so that nothing is ever lost."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy

from gpucnn.data.dataset import Dataset
from gpucnn.data.loader import Batch, Loader
from gpucnn.data.transforms import Augmentation, Preprocessing
from gpucnn.device import Device, on_device
from gpucnn.errors import ArgumentError, NonFiniteError
from gpucnn.layers import Layer
from gpucnn.losses import CrossEntropyLoss
from gpucnn.optimizers import Optimizer
from gpucnn.random import default_generator
from gpucnn.schedules import Schedule
from gpucnn.training.averaging import WeightAverage
from gpucnn.training.buffers import BufferCopy
from gpucnn.training.callbacks import Callback
from gpucnn.training.captured_step import CapturedStep, make_step
from gpucnn.training.checkpoint import Checkpoint, Position
from gpucnn.training.diagnosis import advice_on, find_first_non_finite
from gpucnn.training.evaluation import EvaluationResult, evaluate, input_dtype, make_measurement
from gpucnn.training.forward_passes import ForwardPass
from gpucnn.training.history import EpochRecord, History
from gpucnn.training.interruption import InterruptWatch, TrainingInterrupted
from gpucnn.training.loss_scaling import LossScaler
from gpucnn.training.options import TrainingOptions
from gpucnn.training.preparation import (
    autotuned,
    check_data,
    check_model,
    class_weights,
    default_preprocessing,
    leaves_single_image,
    place_model,
)
from gpucnn.training.progress import Progress
from gpucnn.training.random_state import RandomState
from gpucnn.training.resuming import check_same_run, describe_data
from gpucnn.training.run_folder import RunFolder
from gpucnn.training.saving import Saver, architecture_of, restore
from gpucnn.training.steps import PlainStep, StepParts

_DROPOUT_OFFSET = 1 << 40  # the words before it are left to the initial weights, which start from the same seed


class _ValidationStopped(Exception):
    """Leaves the validation where a signal has come."""


class Trainer:
    """Trains a model that classifies images.

    Args:
        model: gives logits (N, number of classes).
        train: what to train on.
        validation: what to measure on after every epoch, if anything.
        options: the recipe; the defaults unless given.
        preprocessing: how images become inputs; by default resized to the model's ``input_shape`` and normalized
            by the training set's statistics. Data sets that are preprocessed take none.
        augmentation: random changes to the training images.
        run: where to save; nothing is saved without it.
        callbacks: hooks, see :class:`~gpucnn.training.Callback`.
        progress: what to show while training; nothing unless given. See ``make_progress``.
        device: where to move the model: "auto", "cpu", "cuda" or "cuda:1"; by default it trains where it is.
        precision: what the model computes in, from now on: "float32", "float64", "tf32", "bfloat16" or
            "float16", see :mod:`gpucnn.layers.precision`; by default what it does.

    Attributes:
        history: the epochs so far.
        optimizer, schedule: made by :meth:`fit`.
        best_state: the evaluated ``state_dict`` of the best epoch, kept here where there is no ``run``.

    A last batch of a single image is left out of each epoch where the model has batch norm, which cannot normalize
    it after pooling to one value a channel and learns nothing but noise from it before; every epoch has another
    order, so no image is always left out.

    A model in evaluation mode is switched to training. In one that is in training already, layers that were put in
    evaluation by themselves stay so: batch norms keep their statistics, and dropout drops nothing.

    The images, their order, augmentation and dropout do not depend on the device; what is computed of them does,
    in the last digits. A run may be resumed on another device.

    Raises DataError for labels that are no classes, ShapeError where the model's output does not fit the classes,
    DeviceError where the device cannot be used, ArgumentError for a precision that cannot be used, all
    before the first step.
    """

    def __init__(
        self,
        model: Layer,
        train: Dataset,
        validation: Dataset | None = None,
        *,
        options: TrainingOptions | None = None,
        preprocessing: Preprocessing | None = None,
        augmentation: Augmentation | None = None,
        run: RunFolder | None = None,
        callbacks: Sequence[Callback] = (),
        progress: Progress | None = None,
        device: str | Device | None = None,
        precision: str | None = None,
    ) -> None:
        self.model, self.train, self.validation = model, train, validation
        self.options = options or TrainingOptions()
        self.augmentation = augmentation or None
        self.run, self.callbacks, self.progress = run, tuple(callbacks), progress or Progress()
        check_data(train, validation)
        place_model(model, device, precision)
        self.preprocessing = preprocessing or default_preprocessing(model, train)
        self._leaves_out_last = leaves_single_image(model, len(train), self.options.batch_size)
        self.loader = Loader(
            train,
            self.options.batch_size,
            preprocessing=self.preprocessing,
            augmentation=self.augmentation,
            shuffle=True,
            seed=self.options.seed,
            drop_last=self._leaves_out_last,
            workers=self.options.workers,
            prefetch=self.options.prefetch,
            dtype=input_dtype(model),
        )
        check_model(model, train, self.preprocessing)
        weights = class_weights(self.options.class_weights, train)
        # All labels are classes, so none is to be ignored: on a GPU counting the others takes a launch.
        self.loss = CrossEntropyLoss(weights, self.options.label_smoothing, ignore_index=None)
        self.loss.check_targets = False  # check_data has looked at all labels, check_model at the model's classes
        self.history = History(monitor=self.options.monitor)
        self.best_state: dict[str, Any] | None = None
        self.optimizer: Optimizer
        self.schedule: Schedule
        self._average: WeightAverage | None = None
        self._scaler: LossScaler | None = None
        self._buffers: BufferCopy
        self._parts: StepParts
        self._saver: Saver
        self._steps: PlainStep | CapturedStep
        self._measurement: ForwardPass | None = None
        self._data = describe_data(model, train, self.preprocessing, self.augmentation)
        self._random = RandomState(model)
        self._position = Position()
        self._step_callbacks = [
            callback for callback in self.callbacks if type(callback).on_step_end is not Callback.on_step_end
        ]

    # ------------------------------------------------------------ the run

    def fit(self, resume: bool = False) -> History:
        """Train to the end and return the history.

        The model then holds the weights of the last step, or their average with ``ema_decay``; those of the best
        epoch are in the run's ``best.safetensors`` (or :attr:`best_state`), early stopping or not.

        With ``resume``, go on from the run's last checkpoint, or begin where there is none yet. A run that was
        killed and resumed ends with the same bits as one that was not, given the same number of BLAS threads.

        Raises:
            NonFiniteError: the loss or a gradient became infinite or NaN; the weights and the last checkpoint are
                from before that. The message names the layer where it began.
            TrainingInterrupted: SIGINT or SIGTERM came; the step was finished and everything saved.
            CheckpointError: the checkpoint is damaged, or of another model, data set or recipe.
            ArgumentError: the run folder holds a run already and ``resume`` was not asked for, or another process
                trains in it.
            StorageError: a file could not be written; the previous checkpoint is as it was.
        """
        with (
            contextlib.nullcontext() if self.run is None else self.run.locked(),
            autotuned(self.model, self.options.autotune, self.progress.message),
        ):
            return self._fit(resume)

    def _fit(self, resume: bool) -> History:
        try:
            self.loader.device = self.model.device
            with on_device(self.model.device):
                self._begin(resume)
            with (
                on_device(self.model.device),
                InterruptWatch(self.progress.message) as watch,
                numpy.errstate(over="ignore", invalid="ignore", divide="ignore"),  # every step looks for itself
            ):
                for callback in self.callbacks:
                    callback.on_fit_start(self)
                while not self._position.finished:
                    self._train_epoch(watch)
                    self._end_epoch(watch)
        finally:
            self.model.skip_input_gradient(False)
            vars(self).pop("_steps", None)  # graphs hold memory
            self._measurement = None
            self.progress.close()
        if self._average is not None:
            self._average.apply()
        for callback in self.callbacks:
            callback.on_fit_end(self)
        return self.history

    def _begin(self, resume: bool) -> None:
        options, run = self.options, self.run
        if resume and run is None:
            raise ArgumentError("resuming needs a run folder; pass run=RunFolder(path)")
        checkpoint = None
        if run is not None:
            if resume and run.last_path.exists():
                checkpoint = run.read_last()
            elif run.last_path.exists():
                raise ArgumentError(f"{run.path} already holds a run; resume it, or choose another folder")
        self.optimizer = options.make_optimizer(self.model)  # moves the weights to its buffers
        self.schedule = options.make_schedule(len(self.loader))
        self._buffers = BufferCopy(self.model)  # and the running statistics to one of its own
        self._average = None
        if options.ema_decay is not None:
            self._average = WeightAverage(self.model, options.ema_decay, self._buffers)
        self._scaler = LossScaler() if self.model.narrow_dtype == "float16" else None
        if not self.model.training:
            self.model.train()
        self.model.skip_input_gradient()
        self._parts = StepParts(
            self.model,
            self.loss,
            self.optimizer,
            self._buffers,
            self._random,
            self._average,
            self._scaler,
            options.clip_norm,
        )
        self._saver = Saver(run, self._parts, self._data)
        if checkpoint is not None and run is not None:
            self._continue_from(checkpoint, run)
        else:
            self._position = Position()
            self.history = History(monitor=options.monitor)
            default_generator.manual_seed(options.seed)
            default_generator.reserve(_DROPOUT_OFFSET)
        full = min(options.batch_size, len(self.train))
        self._steps = make_step(self._parts, options.capture, full, self.progress.message)
        if self.validation is not None:
            self._measurement = make_measurement(
                self.model, self.validation, options.capture, self.progress.message
            )
        if run is not None:
            if not run.config_path.exists():
                run.create(
                    {"options": options.to_dict(), "model": architecture_of(self.model), "data": self._data}
                )
            run.remove_temporary_files()
            if checkpoint is None:
                self._save()  # so that a run killed at once restarts from these weights, and a full disk shows now
            self.history.write(run.history_path)
        self._saver.begin(self._position)
        if self._leaves_out_last and self._position.step == 0:
            self.progress.message(
                f"the last batch of each epoch would be a single image ({len(self.train)} images, batch size "
                f"{options.batch_size}), which batch norm cannot learn from; it is left out"
            )

    def _train_epoch(self, watch: InterruptWatch) -> None:
        position, options = self._position, self.options
        steps = len(self.loader)
        self._look_again()
        self.progress.begin_epoch(position.epoch + 1, options.epochs, self._images_an_epoch(), position.images)
        if position.batch >= steps:  # stopped between the last step and the end of the validation
            return
        began = time.perf_counter()
        with self.loader.epoch(position.epoch, start_batch=position.batch) as batches:
            for batch in batches:
                loss, correct = self._step(batch)
                count = len(batch.labels)
                position.batch += 1
                position.step += 1
                position.loss_sum += loss * count
                position.correct += correct
                position.images += count
                now = time.perf_counter()
                position.train_seconds += now - began
                position.seconds += now - began
                self.progress.step(count, position.loss_sum / position.images, position.correct / position.images)
                for callback in self._step_callbacks:
                    callback.on_step_end(self, loss)
                    self._look_again()
                if watch.received is not None:
                    raise self._interrupted(watch.received)
                self._saver.save_if_due(self.options, position, self.history)
                began = time.perf_counter()

    def _look_again(self) -> None:
        """A callback may have changed anything."""
        self._steps.look_again()
        if self._average is not None:
            self._average.require_followed()

    def _step(self, batch: Batch) -> tuple[float, int]:
        """(loss, images classified rightly) of a batch, after the optimizer's step."""
        scaler = self._scaler
        random_states = self._random.capture()
        self.optimizer.lr = self.schedule(self._position.step)
        self._parts.clip_norm = self.options.clip_norm  # a callback may have given other options
        loss, norm, correct = self._steps.take(batch.images, batch.labels, self._position.step + 1)
        if not math.isfinite(loss):
            raise self._non_finite("loss", loss, batch, random_states)
        if not math.isfinite(norm):
            if scaler is None or not scaler.can_shrink:
                raise self._non_finite("gradient's norm", norm, batch, random_states)
            self._position.skipped += 1
        if scaler is not None:
            scaler.update(finite=math.isfinite(norm))
        return loss, correct

    def _end_epoch(self, watch: InterruptWatch) -> None:
        position, options = self._position, self.options
        began = time.perf_counter()
        result = self._validate(watch)
        position.seconds += time.perf_counter() - began
        record = EpochRecord(
            epoch=position.epoch + 1,
            step=position.step,
            lr=self.optimizer.lr,
            train_loss=position.loss_sum / position.images,
            train_accuracy=position.correct / position.images,
            validation_loss=None if result is None else result.loss,
            validation_accuracy=None if result is None else result.accuracy,
            seconds=position.seconds,
            images_per_second=position.images / max(position.train_seconds, 1e-9),
            skipped_steps=position.skipped,
            loss_scale=1.0 if self._scaler is None else self._scaler.scale,
        )
        self.history.records.append(record)
        position.next_epoch()
        patience = options.early_stopping
        self.history.stopped_early = (
            patience is not None and self.history.epochs_since_best >= patience and position.epoch < options.epochs
        )
        position.finished = position.epoch >= options.epochs or self.history.stopped_early
        is_best = self.history.best is record
        if is_best:
            self._saver.save_best(options, position, self.history)
            self.best_state = self._saver.best_state
        self._save()
        if self.run is not None:
            self.history.write(self.run.history_path)
        self.progress.end_epoch(record, is_best and result is not None)
        if self.history.stopped_early:
            self.progress.message(f"stopped early: no better epoch in {patience}")
        for callback in self.callbacks:
            callback.on_epoch_end(self, record)

    def _validate(self, watch: InterruptWatch) -> EvaluationResult | None:
        if self.validation is None:
            return None
        self.progress.validate(len(self.validation))

        def stop_if_asked(images_done: int) -> None:
            if watch.received is not None:
                raise _ValidationStopped(watch.received)

        try:
            with self._saver.averaged_weights():
                result = evaluate(
                    self.model,
                    self.validation,
                    self.preprocessing,
                    self.options.resolved_evaluation_batch_size,
                    workers=self.options.workers,
                    after_batch=stop_if_asked,
                    measurement=self._measurement,
                )
        except _ValidationStopped as stopped:  # only out here is the model back at the weights to save
            raise self._interrupted(stopped.args[0]) from None
        if not math.isfinite(result.loss):
            raise NonFiniteError(
                f"the validation loss is {result.loss} after epoch {self._position.epoch + 1}, though training's "
                f"is finite; {self._saver.what_is_kept}; lower the learning rate, or set clip_norm"
            )
        return result

    # ------------------------------------------------------------ saving

    def _save(self) -> None:
        self._saver.save(self.options, self._position, self.history)

    def _interrupted(self, signal_number: int) -> TrainingInterrupted:
        """Save, and give the exception to raise."""
        text = f"stopped in epoch {self._position.epoch + 1}, step {self._position.step}"
        if self.run is None:
            return TrainingInterrupted(f"{text}; without a run folder nothing is saved", signal_number)
        self._save()
        return TrainingInterrupted(f"{text}; saved in {self.run.last_path}, resume from there", signal_number)

    def _continue_from(self, checkpoint: Checkpoint, run: RunFolder) -> None:
        check_same_run(
            checkpoint,
            run.last_path,
            architecture=architecture_of(self.model),
            options=self.options,
            data=self._data,
        )
        restore(checkpoint, self._parts)
        self._position = checkpoint.position
        self._position.finished = checkpoint.stopped_early or self._position.epoch >= self.options.epochs
        self.history = History(checkpoint.history, self.options.monitor, checkpoint.stopped_early)

    # ------------------------------------------------------------ trouble

    def _non_finite(
        self, what: str, value: float, batch: Batch, states: dict[str, dict[str, int]]
    ) -> NonFiniteError:
        self._random.restore(states)
        self._buffers.put_back()
        self.optimizer.zero_grad()
        cause = find_first_non_finite(self.model, self.loss, batch.images, batch.labels)
        position = self._position
        kept = "the weights are those of the step before" if self.run is None else self._saver.what_is_kept
        return NonFiniteError(
            f"the {what} became {value} at step {position.step + 1} (epoch {position.epoch + 1}, batch "
            f"{position.batch + 1}): {cause}; {kept}; {advice_on(batch, self.train.name)}"
        )

    def _images_an_epoch(self) -> int:
        return len(self.train) - 1 if self._leaves_out_last else len(self.train)
