//! The noise of the next step, drawn by the host while the device works on this one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use monteclora_adapters::noise::{Key, Noise, Purpose};

/// Draws noise ahead. The values are those that the modules' keys give; only the time at which they are drawn differs.
#[derive(Debug)]
pub(super) struct NoiseAhead {
    seed: u64,
    is_on: bool,
    next: Option<(u64, JoinHandle<Values>)>,
}

/// What a module asks of its key in a step. A method asks for the same in every step.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Request {
    module: String,
    purpose: u64,
    count: usize,
}

type Values = HashMap<Request, Vec<f32>>;

/// The noise of one step.
#[derive(Debug)]
pub(super) struct StepNoise {
    seed: u64,
    step: u64,
    ready: Mutex<Values>,
    asked: Mutex<Vec<(Request, Purpose)>>,
}

/// The noise of one module in one step.
pub(super) struct ModuleNoise<'a> {
    key: Key,
    module: String,
    of_step: &'a StepNoise,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NoiseAhead {
    /// The noise of a run under `seed`. It is drawn ahead if `is_on`: where another device computes, not where it would
    /// take cores from the computation.
    pub(super) fn new(seed: u64, is_on: bool) -> Self {
        Self {
            seed,
            is_on,
            next: None,
        }
    }

    /// The noise of `step`, with what was drawn ahead for it.
    pub(super) fn at(&mut self, step: u64) -> StepNoise {
        let next = self.next.take().filter(|(of, _)| *of == step);
        // Noise that could not be drawn ahead is drawn when it is asked for.
        let ready = next.and_then(|(_, thread)| thread.join().ok());
        StepNoise {
            seed: self.seed,
            step,
            ready: Mutex::new(ready.unwrap_or_default()),
            asked: Mutex::default(),
        }
    }

    /// Begins to draw the noise of the step after `noise`, as much as that step asked for.
    pub(super) fn prepare_after(&mut self, noise: StepNoise) {
        if !self.is_on {
            return;
        }
        let (seed, step) = (noise.seed, noise.step + 1);
        let asked = noise.asked.into_inner();
        let asked = asked.unwrap_or_else(PoisonError::into_inner);
        let draw = move || {
            let values = asked.into_iter().map(|(request, purpose)| {
                let key = Key::new(seed, &request.module, step);
                let values = key.normals_f32(purpose, request.count);
                (request, values)
            });
            values.collect()
        };
        let thread = std::thread::Builder::new().name("noise".to_owned());
        self.next = thread.spawn(draw).ok().map(|thread| (step, thread));
    }
}

impl StepNoise {
    /// The noise of `module`.
    pub(super) fn of(&self, module: &str) -> ModuleNoise<'_> {
        ModuleNoise {
            key: Key::new(self.seed, module, self.step),
            module: module.to_owned(),
            of_step: self,
        }
    }
}

impl Noise for ModuleNoise<'_> {
    /// Of these there are few: they are not drawn ahead.
    fn normals(&self, purpose: Purpose, count: usize) -> Vec<f64> {
        self.key.normals(purpose, count)
    }

    fn normals_f32(&self, purpose: Purpose, count: usize) -> Vec<f32> {
        let request = Request {
            module: self.module.clone(),
            purpose: purpose as u64,
            count,
        };
        let ready = lock(&self.of_step.ready).remove(&request);
        lock(&self.of_step.asked).push((request, purpose));
        ready.unwrap_or_else(|| self.key.normals_f32(purpose, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULES: [(&str, usize); 3] = [("a", 5000), ("b", 12), ("c", 4097)];

    fn drawn(noise: &StepNoise) -> Vec<Vec<f32>> {
        let of = |(module, count)| noise.of(module).normals_f32(Purpose::Gaussian, count);
        MODULES.map(of).to_vec()
    }

    /// Equal to the bit with and without, from any first step, and where a step is repeated or left out.
    #[test]
    fn noise_drawn_ahead_is_that_of_the_keys() {
        let (mut ahead, mut direct) = (NoiseAhead::new(9, true), NoiseAhead::new(9, false));
        for step in [4, 5, 6, 6, 8, 9] {
            let (noise, expected) = (ahead.at(step), direct.at(step));
            assert_eq!(drawn(&noise), drawn(&expected));
            for (module, count) in MODULES {
                let key = Key::new(9, module, step);
                let normals = noise.of(module).normals(Purpose::Wishart, count.min(9));
                assert_eq!(normals, key.normals(Purpose::Wishart, count.min(9)));
            }
            ahead.prepare_after(noise);
            direct.prepare_after(expected);
            assert!(direct.next.is_none());
        }
    }

    /// What was drawn ahead is what the next step gets, without another draw.
    #[test]
    fn the_next_step_takes_what_was_drawn() {
        let mut ahead = NoiseAhead::new(2, true);
        let first = ahead.at(0);
        drawn(&first);
        ahead.prepare_after(first);
        let second = ahead.at(1);
        assert_eq!(lock(&second.ready).len(), MODULES.len());
        drawn(&second);
        assert!(lock(&second.ready).is_empty());
    }
}
