//! What must hold, and what happens where it does not: the run ends by a panic, as if the core itself had failed.

use std::cell::RefCell;
use std::fmt;

/// What must hold at every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// Both ends of each stream get the bytes that the other has sent.
    Exact,
    /// No client is reset whose flow was not lost by what the nodes themselves called unprotected.
    NoReset,
    /// Who takes over has every flow that was called protected.
    Survives,
    /// No client is told of a byte that the standby does not hold, while the gate guards its flow.
    NotAhead,
    /// Nor of room that the standby does not have.
    NotWider,
    /// Nothing that a live shadow says contradicts what its client was told before, or agreed on.
    Consistent,
    /// Two gates are not open at once.
    OneGate,
    /// A takeover has a higher epoch than all before.
    EpochsGrow,
    /// A datagram between the nodes counts once.
    Once,
    /// Without approval no FIN or RST leaves.
    Approved,
    /// When the trouble is over every client gets what it wants.
    Ends,
    /// Nothing panics.
    NoPanic,
}

/// It did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// How it was noticed.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.invariant, self.what)
    }
}

thread_local! {
    static BROKEN: RefCell<Option<Violation>> = const { RefCell::new(None) };
}

/// Ends the run.
pub(crate) fn broken(invariant: Invariant, what: impl Into<String>) -> ! {
    let violation = Violation {
        invariant,
        what: what.into(),
    };
    let text = violation.to_string();
    BROKEN.replace(Some(violation));
    panic!("{text}");
}

/// What has ended a run that panicked.
pub(crate) fn take(panic: &(dyn std::any::Any + Send)) -> Violation {
    BROKEN.take().unwrap_or_else(|| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Violation {
            invariant: Invariant::NoPanic,
            what: text.unwrap_or("a panic without words").to_owned(),
        }
    })
}

/// `hold!(invariant, condition, words)`: ends the run where the condition is false.
macro_rules! hold {
    ($invariant:ident, $condition:expr, $($words:tt)+) => {
        if !$condition {
            $crate::simulation::invariant::broken(
                $crate::simulation::invariant::Invariant::$invariant,
                format!($($words)+),
            );
        }
    };
}
pub(crate) use hold;
