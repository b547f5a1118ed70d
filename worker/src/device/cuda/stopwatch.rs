//! How long a step's exchanges between ranks take on the GPU: a point in the stream before and after each, as a kernel of
//! the exchange also waits for the other ranks.
//!
//! All points are made before the first step and read when a step has landed, so a step allocates nothing and waits for
//! nobody. A recorded step has none: points that are recorded in a graph tell no time. Whatever goes wrong here ends the
//! timing, never the step.

use std::time::Duration;

use super::driver::Event;
use crate::device::{AHEAD_MAX, DeviceError};

/// Exchanges of a step beside two a layer and one for the embedding: of the head, one or two a batch of asked rows. A step
/// with more is not timed.
const MORE: usize = 8;

/// A point in a stream.
pub(super) trait Point {
    /// Sets it after everything that was given to the stream.
    fn set(&self) -> Result<(), DeviceError>;
    /// Seconds from `earlier` to this one, which was reached.
    fn seconds_after(&self, earlier: &Self) -> Result<f64, DeviceError>;
}

impl Point for Event {
    fn set(&self) -> Result<(), DeviceError> {
        self.record()
    }

    fn seconds_after(&self, earlier: &Self) -> Result<f64, DeviceError> {
        self.seconds_since(earlier)
    }
}

/// The points of the steps that take turns.
pub(super) struct Stopwatch<P> {
    sides: [Vec<[P; 2]>; AHEAD_MAX],
    /// The step that is being given to the stream.
    side: usize,
    timed: bool,
    /// Its exchanges so far.
    used: usize,
}

impl<P: Point> Stopwatch<P> {
    /// One that times nothing.
    pub(super) fn off() -> Self {
        Self {
            sides: [const { Vec::new() }; AHEAD_MAX],
            side: 0,
            timed: false,
            used: 0,
        }
    }

    /// For steps of a model with so many layers; `point` makes one.
    pub(super) fn new(
        n_layers: usize,
        mut point: impl FnMut() -> Result<P, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let mut made = Self::off();
        for side in &mut made.sides {
            for _ in 0..2 * n_layers + 1 + MORE {
                side.push([point()?, point()?]);
            }
        }
        Ok(made)
    }

    /// A step begins; the last one on this side has landed.
    pub(super) fn begin(&mut self, side: usize, timed: bool) {
        self.side = side;
        self.timed = timed && !self.sides[side].is_empty();
        self.used = 0;
    }

    /// Gives an exchange to the stream, between two points.
    pub(super) fn around(
        &mut self,
        exchange: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        if !self.timed {
            return exchange();
        }
        let Some([before, after]) = self.sides[self.side].get(self.used) else {
            self.timed = false;
            return exchange();
        };
        let begun = before.set();
        exchange()?;
        match begun.and_then(|()| after.set()) {
            Ok(()) => self.used += 1,
            Err(error) => self.fail(&error),
        }
        Ok(())
    }

    /// Exchanges of the step that was given last; `None` if it is not timed.
    pub(super) fn taken(&self) -> Option<usize> {
        self.timed.then_some(self.used)
    }

    /// The time of so many exchanges of the step on this side, which has landed.
    pub(super) fn read(&mut self, side: usize, taken: Option<usize>) -> Option<Duration> {
        let pairs = self.sides[side].get(..taken?)?;
        let seconds: Result<f64, DeviceError> = pairs
            .iter()
            .map(|[before, after]| after.seconds_after(before))
            .sum();
        match seconds {
            Ok(seconds) => Some(Duration::from_secs_f64(seconds.max(0.0))),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Times nothing any more.
    fn fail(&mut self, error: &DeviceError) {
        tracing::warn!("exchanges between ranks are not timed any more: {error}");
        *self = Self::off();
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    /// A stream whose clock a test turns.
    #[derive(Clone, Default)]
    struct Stream {
        now: Rc<Cell<f64>>,
        made: Rc<Cell<usize>>,
        fails: Rc<Cell<bool>>,
    }

    struct Mark {
        stream: Stream,
        at: Cell<f64>,
    }

    impl Stream {
        fn point(&self) -> Result<Mark, DeviceError> {
            self.made.set(self.made.get() + 1);
            Ok(Mark {
                stream: self.clone(),
                at: Cell::new(f64::NAN),
            })
        }

        fn run(&self, seconds: f64) -> Result<(), DeviceError> {
            self.now.set(self.now.get() + seconds);
            Ok(())
        }
    }

    impl Point for Mark {
        fn set(&self) -> Result<(), DeviceError> {
            if self.stream.fails.get() {
                return Err(DeviceError::Cuda("no".into()));
            }
            self.at.set(self.stream.now.get());
            Ok(())
        }

        fn seconds_after(&self, earlier: &Self) -> Result<f64, DeviceError> {
            Ok(self.at.get() - earlier.at.get())
        }
    }

    fn watch(stream: &Stream) -> Stopwatch<Mark> {
        Stopwatch::new(2, || stream.point()).expect("points are made")
    }

    #[test]
    fn exchanges_of_steps_that_take_turns_are_added_up() {
        let stream = Stream::default();
        let mut watch = watch(&stream);
        let made = stream.made.get();
        watch.begin(1, true);
        for seconds in [0.5, 0.25] {
            watch.around(|| stream.run(seconds)).expect("runs");
            stream.run(7.0).expect("between exchanges");
        }
        let first = watch.taken();
        watch.begin(0, true);
        watch.around(|| stream.run(2.0)).expect("runs");
        let second = watch.taken();
        assert_eq!(watch.read(1, first), Some(Duration::from_millis(750)));
        assert_eq!(watch.read(0, second), Some(Duration::from_secs(2)));
        watch.begin(1, true);
        let nothing = watch.taken();
        assert_eq!(watch.read(1, nothing), Some(Duration::ZERO));
        assert_eq!(stream.made.get(), made, "steps make no points");
    }

    #[test]
    fn what_is_recorded_or_has_no_room_is_not_timed() {
        let stream = Stream::default();
        let mut watch = watch(&stream);
        watch.begin(0, false);
        watch.around(|| stream.run(1.0)).expect("runs");
        assert_eq!(watch.taken(), None);
        watch.begin(0, true);
        for _ in 0..2 * 2 + 1 + MORE {
            watch.around(|| stream.run(1.0)).expect("runs");
        }
        assert!(watch.taken().is_some());
        watch.around(|| stream.run(1.0)).expect("runs");
        let taken = watch.taken();
        assert_eq!((taken, watch.read(0, taken)), (None, None));
        let mut off = Stopwatch::<Mark>::off();
        off.begin(0, true);
        off.around(|| stream.run(1.0)).expect("runs");
        assert_eq!(off.taken(), None);
    }

    #[test]
    fn a_failure_ends_the_timing_and_not_the_step() {
        let stream = Stream::default();
        let mut watch = watch(&stream);
        watch.begin(0, true);
        stream.fails.set(true);
        watch
            .around(|| stream.run(3.0))
            .expect("the exchange itself works");
        assert_eq!((stream.now.get(), watch.taken()), (3.0, None));
        stream.fails.set(false);
        watch.begin(0, true);
        assert_eq!(watch.taken(), None, "not any more");
        let refused = watch.around(|| Err(DeviceError::Interrupted));
        assert_eq!(refused, Err(DeviceError::Interrupted));
    }
}
