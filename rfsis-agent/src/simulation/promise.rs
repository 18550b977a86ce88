//! What the nodes have said of each flow, and so what may be asked of a takeover.
//!
//! A flow may be lost where the nodes themselves have said that it is not protected, and nowhere else:
//! with `protect: sync` that is the word of the active's guard, of the very standby that takes over;
//! with `async` that of the standby's shadow, as long as the client was told of nothing that this shadow was not
//! shown. See the README, "Limits".

use std::collections::BTreeMap;
use std::fmt;

use super::*;
use crate::metrics::FlowCondition;

/// Why a flow may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exempt {
    /// The active called it unguarded: exposed, still to be handed over, or on a shadow of its own.
    Unguarded,
    /// The standby's agent was another than the one that the active spoke of.
    OtherStandby,
    /// `protect: async`: the standby's shadow lacked something, or there was none.
    NotInLockstep,
    /// `protect: async`: the client was told of bytes whose copies were lost.
    CopyLost,
    /// The LAN was cut and both nodes were active.
    TwoActives,
    /// A service whose bytes no other node can compute, and whose copies may be lost.
    Unpredictable,
}

/// What came of a run, or of many.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Runs.
    pub runs: u64,
    /// Connections that clients opened.
    pub connections: u64,
    /// Of these, those that came to their end.
    pub ended: u64,
    /// Takeovers of running flows by another node.
    pub takeovers: u64,
    /// Times that a flow was called protected, its active failed or handed over, and it went on.
    pub survived: u64,
    /// Of these, in the last of several takeovers of one flow.
    pub again: u64,
    /// Flows that were adopted by a kernel.
    pub adopted: u64,
    /// Openings on which the kernels agreed by themselves.
    pub agreed: u64,
    /// Times that the standby's kernel has confirmed what was in its ring.
    pub pledges_kept: u64,
    /// Flows that were called unprotected when their active failed, by reason.
    pub exempt: BTreeMap<Exempt, u64>,
    /// Of these, those that were lost.
    pub lost: u64,
    /// Datagrams and heartbeats that were replayed.
    pub replayed: u64,
    /// Steps.
    pub events: u64,
}

impl Tally {
    /// Adds another.
    pub fn add(&mut self, other: &Tally) {
        for (sum, value) in [
            (&mut self.runs, other.runs),
            (&mut self.connections, other.connections),
            (&mut self.ended, other.ended),
            (&mut self.takeovers, other.takeovers),
            (&mut self.survived, other.survived),
            (&mut self.again, other.again),
            (&mut self.adopted, other.adopted),
            (&mut self.agreed, other.agreed),
            (&mut self.pledges_kept, other.pledges_kept),
            (&mut self.lost, other.lost),
            (&mut self.replayed, other.replayed),
            (&mut self.events, other.events),
        ] {
            *sum += value;
        }
        for (reason, count) in &other.exempt {
            *self.exempt.entry(*reason).or_default() += count;
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} runs, {} steps: {} connections, {} opened by the kernels alone, {} came to their end",
            self.runs, self.events, self.connections, self.agreed, self.ended
        )?;
        writeln!(
            f,
            "{} confirmations by the standby's kernel alone; {} takeovers; {} times a flow that was called protected went on, {} of them not for the first time; {} adopted",
            self.pledges_kept, self.takeovers, self.survived, self.again, self.adopted
        )?;
        write!(f, "called unprotected when their active failed:")?;
        for (reason, count) in &self.exempt {
            write!(f, " {reason:?} {count}")?;
        }
        write!(
            f,
            "; {} lost; {} messages replayed",
            self.lost, self.replayed
        )
    }
}

/// A guard says of a flow that it guards it: with what standby.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Word {
    /// Its session.
    pub(crate) session: u64,
    /// In which it confirms.
    pub(crate) epoch: u64,
}

/// The words of a machine, as last said.
pub(crate) type Words = BTreeMap<FlowKey, Word>;

/// The record of a run.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    exempt: BTreeMap<FlowKey, Exempt>,
    survived: BTreeMap<FlowKey, u64>,
    /// Of agents that are dead, or active no longer.
    last_words: [Words; 2],
    /// Of the other node, when one took over.
    at_takeover: [Words; 2],
    /// What the kernel of who took over had already.
    goes_on: [Vec<FlowKey>; 2],
    /// What is to be there when the shadows have gone live.
    due: Vec<FlowKey>,
    pub(crate) tally: Tally,
}

impl Promises {
    pub(crate) fn is_exempt(&self, flow: &FlowKey) -> bool {
        self.exempt.contains_key(flow)
    }

    /// From now on the flow may be lost.
    pub(crate) fn exempt(&mut self, flow: FlowKey, why: Exempt) {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.exempt.entry(flow) {
            entry.insert(why);
            *self.tally.exempt.entry(why).or_default() += 1;
        }
    }

    /// It was spared when it was not protected, and is called protected again: from now on it must go on. What
    /// two actives have told a client, or what it was told of lost copies, cannot be made good.
    fn redeem(&mut self, flow: &FlowKey) {
        if let Some(Exempt::Unguarded | Exempt::OtherStandby | Exempt::NotInLockstep) =
            self.exempt.get(flow)
        {
            self.exempt.remove(flow);
        }
    }

    /// Of the node that was active before; one that is standby again has said its words.
    fn words(&self, machine: &Machine) -> Words {
        match &machine.agent {
            Some(agent) if !agent.is_standby() => machine.words(),
            _ => self.last_words[machine.index].clone(),
        }
    }

    /// Whether this machine guards a flow, or has guarded it when its agent died.
    pub(crate) fn guards(&self, machine: &Machine, flow: FlowKey) -> Option<Word> {
        match &machine.agent {
            Some(agent) => agent.guards(flow),
            None => self.last_words[machine.index].get(&flow).copied(),
        }
    }

    /// The agent of a machine has come to the end of its epoch, with these words.
    pub(crate) fn note_end(&mut self, machine: usize, words: Words) {
        self.last_words[machine] = words;
    }

    /// An agent has started: what an older one has said there is of no meaning for new takeovers by it.
    pub(crate) fn note_start(&mut self, machine: usize) {
        // The older agent's flows are gone with it, if nobody has taken over meanwhile.
        self.at_takeover[machine].clear();
    }

    /// A node has just opened its gate. `opened`: the flows of clients.
    pub(crate) fn note_takeover(
        &mut self,
        taker: usize,
        machines: &[Machine; 2],
        opened: &[FlowKey],
        goes_on: Vec<FlowKey>,
    ) {
        let words = self.words(&machines[1 - taker]);
        self.goes_on[taker] = goes_on;
        if machines[taker].terms.setup.sync {
            for flow in opened {
                if !self.goes_on[taker].contains(flow) && !words.contains_key(flow) {
                    self.exempt(*flow, Exempt::Unguarded);
                }
            }
        }
        self.at_takeover[taker] = words;
        self.last_words[1 - taker].clear();
    }

    /// Its shadows are about to go live: sets down which must. `views` of the shadows: with `async`, by flow, the
    /// condition and whether all is there that the client was told.
    pub(crate) fn judge(
        &mut self,
        taker: &Machine,
        opened: &[FlowKey],
        views: &BTreeMap<FlowKey, (Option<FlowCondition>, bool)>,
    ) {
        self.due.clear();
        let mut moved = false;
        for &flow in opened {
            if self.goes_on[taker.index].contains(&flow) {
                continue;
            }
            let verdict = if taker.terms.setup.sync {
                let honours = |word| taker.agent.as_ref().is_some_and(|a| a.honoured(word));
                match self.at_takeover[taker.index].get(&flow) {
                    // The bytes of its client are guarded, the copies of the answer are not.
                    _ if flow.service_port == DAYTIME => Err(Exempt::Unpredictable),
                    None => Err(Exempt::Unguarded),
                    Some(word) if !honours(*word) => Err(Exempt::OtherStandby),
                    Some(_) => Ok(()),
                }
            } else {
                match views.get(&flow) {
                    Some((Some(FlowCondition::Lockstep), true)) => Ok(()),
                    Some((Some(FlowCondition::Lockstep), false)) => Err(Exempt::CopyLost),
                    _ => Err(Exempt::NotInLockstep),
                }
            };
            moved = true;
            match verdict {
                Ok(()) => {
                    self.redeem(&flow);
                    if !self.is_exempt(&flow) {
                        self.due.push(flow);
                    }
                }
                Err(why) => self.exempt(flow, why),
            }
        }
        self.at_takeover[taker.index].clear();
        self.tally.takeovers += u64::from(moved);
    }

    /// The shadows of these flows have gone live.
    pub(crate) fn check(&mut self, taker: &Machine, there: &HashSet<FlowKey>) {
        for flow in std::mem::take(&mut self.due) {
            let has = there.contains(&flow) || taker.kernel.connections.contains_key(&flow);
            let port = flow.client_port;
            hold!(
                Survives,
                has,
                "port {port} was called protected, and who takes over does not have it"
            );
            let times = self.survived.entry(flow).or_default();
            *times += 1;
            self.tally.survived += 1;
            self.tally.again += u64::from(*times > 1);
        }
    }
}
