//! The planned handover, as the operator asks for it: on the active, on the standby, or by stopping the
//! active's agent.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rfsis_common::maps::State;
use tokio::sync::{Mutex, broadcast};
use tokio::time::{Instant, sleep, timeout_at};

use crate::heartbeat::wish::{Objection, Wish};
use crate::metrics::{Metrics, Protection};
use crate::node::{Event, Fact};
use crate::pulse::PulseHandle;
use crate::redundancy::{Redundancy, age};
use crate::shared::Shared;

/// Flows lag for moments, as connections open and close. So long nothing is refused for that.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks meanwhile.
const LOOK: Duration = Duration::from_millis(20);

/// An offer is taken, or taken back, within so many takeover times and this; and no longer than at the most
/// is waited for it. Beyond this something is broken.
const TAKEOVER_TIMES: u32 = 3;
const OUTCOME: Duration = Duration::from_secs(3);
const OUTCOME_MOST: Duration = Duration::from_secs(50);

/// Why the VIP was not handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The reason.
    pub objection: Objection,
    /// Flows that would be lost, as far as is known.
    pub flows: u32,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.objection {
            Objection::AtRisk => write!(
                f,
                "{} flow{} unprotected: {}; --force hands over all the same",
                self.flows,
                if self.flows == 1 { " is" } else { "s are" },
                self.objection
            ),
            Objection::Degraded => {
                write!(f, "{}; --force hands over all the same", self.objection)
            }
            _ => write!(f, "{}", self.objection),
        }
    }
}

impl From<Objection> for Refused {
    fn from(objection: Objection) -> Self {
        Self {
            objection,
            flows: 0,
        }
    }
}

/// Hands the VIP over, or asks the peer to.
#[derive(Debug)]
pub struct Switchover {
    pulse: PulseHandle,
    facts: broadcast::Sender<Fact>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    redundancy: Arc<Redundancy>,
    takeover_time: Duration,
    /// One at a time.
    busy: Mutex<()>,
}

impl Switchover {
    /// `facts` repeats what the heartbeat thread of `pulse` reports.
    pub fn new(
        pulse: PulseHandle,
        facts: broadcast::Sender<Fact>,
        shared: Arc<Shared>,
        metrics: Arc<Metrics>,
        redundancy: Arc<Redundancy>,
        takeover_time: Duration,
    ) -> Self {
        Self {
            pulse,
            facts,
            shared,
            metrics,
            redundancy,
            takeover_time,
            busy: Mutex::new(()),
        }
    }

    /// Moves the VIP to the other node, whichever of both this is.
    ///
    /// # Errors
    /// Why it stays where it is.
    pub async fn switch(&self, insists: bool) -> Result<(), Refused> {
        let _turn = self.busy.lock().await;
        match self.shared.node().state {
            State::Active => self.hand_over(insists).await,
            State::Standby => self.ask(insists).await,
            _ => Err(Objection::NotActive.into()),
        }
    }

    /// The agent of the active ends: whatever is lost by a handover, more is lost without.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn leave(&self) -> Result<(), Refused> {
        let _turn = self.busy.lock().await;
        self.hand_over(true).await
    }

    /// The standby wishes for the VIP. Where it does not get it, it is told why.
    pub async fn grant(&self, wish: Wish) {
        let _turn = self.busy.lock().await;
        if let Err(refused) = self.hand_over(wish == Wish::Insists).await {
            tracing::warn!("the peer asks for the VIP: {refused}");
            self.pulse.order(Event::Object(refused.objection));
        }
    }

    async fn hand_over(&self, insists: bool) -> Result<(), Refused> {
        let deadline = Instant::now() + PATIENCE;
        if !insists {
            self.redundancy.look(true).await;
        }
        while let Some(refused) = self.objection().filter(|refused| {
            !insists
                || matches!(
                    refused.objection,
                    Objection::NoStandby | Objection::NotActive
                )
        }) {
            if refused.objection != Objection::AtRisk || Instant::now() >= deadline {
                return Err(refused);
            }
            sleep(LOOK).await;
            self.redundancy.look(true).await;
        }
        let facts = self.facts.subscribe();
        self.pulse.order(Event::HandOver);
        self.outcome(facts, |fact| match fact {
            Fact::Yielded(..) => Some(Ok(())),
            Fact::NotHandedOver(objection) => Some(Err(objection.into())),
            Fact::Resumed { .. } => Some(Err(Objection::Unanswered.into())),
            _ => None,
        })
        .await
    }

    async fn ask(&self, insists: bool) -> Result<(), Refused> {
        let peer = self.shared.node().peer;
        if !peer.is_some_and(|peer| matches!(peer.state, State::Active | State::TakingOver)) {
            return Err(Objection::NotActive.into());
        }
        let facts = self.facts.subscribe();
        self.pulse.order(Event::Wish(Wish::new(insists)));
        let outcome = self
            .outcome(facts, |fact| match fact {
                Fact::NowActive(_) => Some(Ok(())),
                Fact::Refused { objection, flows } => Some(Err(Refused { objection, flows })),
                _ => None,
            })
            .await;
        self.pulse.order(Event::Wish(Wish::None));
        outcome
    }

    /// What speaks against a handover by this node, as far as is known now.
    fn objection(&self) -> Option<Refused> {
        let node = self.shared.node();
        let degraded = self.metrics.protection.chosen() == Some(Protection::Degraded);
        let flows = self.shared.at_risk();
        let heard = self
            .shared
            .peer_heard_at()
            .is_some_and(|at| age(at) < self.takeover_time);
        match node.peer.filter(|_| heard) {
            _ if node.state != State::Active => Some(Objection::NotActive.into()),
            None => Some(Objection::NoStandby.into()),
            Some(peer) if peer.state != State::Standby => Some(Objection::NoStandby.into()),
            Some(_) if degraded => Some(Objection::Degraded.into()),
            Some(peer) if peer.at_risk.max(flows) > 0 => Some(Refused {
                objection: Objection::AtRisk,
                flows: peer.at_risk.max(flows),
            }),
            Some(_) => None,
        }
    }

    /// Waits for the fact that decides.
    async fn outcome(
        &self,
        mut facts: broadcast::Receiver<Fact>,
        decides: impl Fn(Fact) -> Option<Result<(), Refused>>,
    ) -> Result<(), Refused> {
        let patience = OUTCOME + self.takeover_time * TAKEOVER_TIMES;
        let deadline = Instant::now() + patience.min(OUTCOME_MOST);
        loop {
            match timeout_at(deadline, facts.recv()).await {
                Ok(Ok(fact)) => {
                    if let Some(outcome) = decides(fact) {
                        return outcome;
                    }
                }
                // Facts come a few at a time, and thousands would have to be missed.
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => {}
                Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => {
                    return Err(Objection::Unanswered.into());
                }
            }
        }
    }
}
