//! Runs of seeds: one, many, and ever smaller ones of a seed that fails.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::invariant::{self, Violation};
pub use super::promise::{Exempt, Tally};
use super::{Cluster, Scenario};
pub use crate::fault::Fault;
use crate::fault::turn_on;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// A run that ends by a panic is a result here, not something to be printed.
fn quietly<T>(run: impl FnOnce() -> T) -> std::thread::Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    QUIET.set(false);
    result
}

/// The first seed that catches this fault, and what it says; `None` if none of the first `seeds` does.
pub fn caught(fault: Fault, seeds: u64) -> Option<(u64, Violation)> {
    (0..seeds).find_map(|seed| {
        let violation = History::of(seed).run(Some(fault), false).err()?;
        Some((seed, violation))
    })
}

/// One history: a seed, and what is left out of it.
#[derive(Clone, Debug)]
pub struct History {
    scenario: Scenario,
    kept: Vec<usize>,
    clients: Vec<usize>,
}

impl History {
    /// All that the seed makes.
    pub fn of(seed: u64) -> Self {
        let scenario = Scenario::of(seed);
        Self {
            kept: (0..scenario.troubles.len()).collect(),
            clients: (0..scenario.opens.len()).collect(),
            scenario,
        }
    }

    /// With these of its troubles only.
    pub fn keep(mut self, troubles: &[usize]) -> Self {
        self.kept.retain(|index| troubles.contains(index));
        self
    }

    /// With these of its clients only.
    pub fn clients(mut self, clients: &[usize]) -> Self {
        self.clients.retain(|index| clients.contains(index));
        self
    }

    fn scenario(&self) -> Scenario {
        let mut scenario = self.scenario.clone();
        let all = &self.scenario;
        scenario.troubles = self.kept.iter().map(|i| all.troubles[*i]).collect();
        scenario.opens = self.clients.iter().map(|i| all.opens[*i]).collect();
        scenario
    }

    /// What happens in it, in words.
    pub fn describe(&self) -> String {
        self.scenario().to_string()
    }

    /// Runs it; `trace` prints what happens.
    ///
    /// # Errors
    /// What did not hold.
    pub fn run(&self, fault: Option<Fault>, trace: bool) -> Result<Tally, Violation> {
        let scenario = self.scenario();
        turn_on(fault);
        let result = quietly(|| Cluster::new(&scenario, trace).run());
        turn_on(None);
        result.map_err(|panic| invariant::take(&*panic))
    }

    /// The command that replays it.
    pub fn command(&self) -> String {
        let list = |indices: &[usize]| {
            let words: Vec<String> = indices.iter().map(usize::to_string).collect();
            if words.is_empty() {
                "none".to_owned()
            } else {
                words.join(",")
            }
        };
        let mut command = format!("cargo xtask sim --seed {}", self.scenario.seed);
        if self.kept.len() < self.scenario.troubles.len() {
            command += &format!(" --keep {}", list(&self.kept));
        }
        if self.clients.len() < self.scenario.opens.len() {
            command += &format!(" --clients {}", list(&self.clients));
        }
        command
    }

    /// A smaller one that breaks the same invariant: without what it can do without.
    pub fn minimise(&self, fault: Option<Fault>, violation: &Violation) -> Self {
        let mut best = self.clone();
        let fails = |history: &Self| {
            let result = history.run(fault, false);
            result.is_err_and(|found| found.invariant == violation.invariant)
        };
        loop {
            let mut smaller = None;
            for index in 0..best.kept.len() {
                let mut candidate = best.clone();
                candidate.kept.remove(index);
                if fails(&candidate) {
                    smaller = Some(candidate);
                    break;
                }
            }
            if smaller.is_none() && best.clients.len() > 1 {
                for index in 0..best.clients.len() {
                    let mut candidate = best.clone();
                    candidate.clients.remove(index);
                    if fails(&candidate) {
                        smaller = Some(candidate);
                        break;
                    }
                }
            }
            match smaller {
                Some(candidate) => best = candidate,
                None => return best,
            }
        }
    }
}
