//! The active's half of a late join: hands the flows that the standby does not know over to it, a few at a
//! time.
//!
//! Sans-IO: [`Joins`] takes what the standby says, snapshots that were asked for, and the time; what it has
//! to say it appends to a list of records. [`Guard`](crate::guard::Guard) decides which flows it is about.
//!
//! ```text
//!  want ──► QUEUED ──(its turn)──► OFFERED ──(GOT: the standby keeps its frames)──► ASKED ──┐
//!             ▲                      │  OFFER, repeated                  its task is to take │
//!             │ later, and only      │                                        the snapshot   │
//!             │ so many times        ▼                                                       ▼
//!             └──── silence, LOST, no snapshot ◄─────────────────────────────────────────  SENDING
//!                         │                                            PARTs, repeated from   │
//!                 so many times, or DECLINE                            the last GOT           │
//!                         ▼                                                                   ▼
//!                      DECLINED                                 GOT of all: the flow is known there
//! ```
//!
//! The standby keeps the flow's frames from before the snapshot is taken, so nothing is missing between the
//! two. What is under way is bounded in flows and in bytes, and so is what begins in a millisecond: live
//! traffic goes before.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};

use rfsis_common::maps::FlowKey;

use crate::collections::HashMap;
use crate::heartbeat::Nanos;
use crate::metrics::JoinResult;
use crate::sync::{MAX_PART_LEN, MAX_SNAPSHOT, Part, Record};

const MS: Nanos = 1_000_000;
const SECOND: Nanos = 1_000 * MS;

/// Flows that are offered or sent at a time.
const FLOWS_AT_ONCE: usize = 32;

/// Bytes that were sent and not acknowledged, of all flows: they find room in the buffer of a socket.
const BYTES_AT_ONCE: usize = 48 * 1024;

/// What may begin in each of these times, ns: flows that are offered, and bytes that are sent (400 Mbit/s).
const TICK: Nanos = MS;
const OFFERS_A_TICK: usize = 8;
const BYTES_A_TICK: usize = 48 * 1024;

/// What is not answered is said again after this, and then ever more rarely, ns.
const REPEAT: Nanos = 4 * MS;
const REPEAT_MOST: Nanos = 64 * MS;

/// A standby that answers nothing for so long has given this one up, ns.
const PATIENCE: Nanos = SECOND;

/// How often a flow is offered, and the pause after the first time, ns; each is twice as long as the last.
const ATTEMPTS: u32 = 5;
const PAUSE: Nanos = 50 * MS;

/// A late join that has come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub result: JoinResult,
    /// Since the flow was found to be unknown to the standby, ns.
    pub took: Nanos,
}

#[derive(Debug)]
enum Phase {
    Queued,
    /// It failed; queued again when its timer is due.
    Pausing,
    Offered {
        since: Nanos,
        pause: Nanos,
    },
    Asked,
    Sending {
        bytes: Vec<u8>,
        acked: usize,
        sent: usize,
        moved_at: Nanos,
        pause: Nanos,
    },
    Declined,
}

impl Phase {
    /// Whether it takes one of the places.
    fn is_under_way(&self) -> bool {
        matches!(
            self,
            Phase::Offered { .. } | Phase::Asked | Phase::Sending { .. }
        )
    }
}

#[derive(Debug)]
struct Join {
    number: u32,
    phase: Phase,
    attempts: u32,
    wanted_at: Nanos,
    /// When its timer is due, if it has one.
    timer: Option<Nanos>,
}

/// All late joins of an active node.
#[derive(Debug, Default)]
pub struct Joins {
    joins: HashMap<FlowKey, Join>,
    queue: VecDeque<FlowKey>,
    /// Flows that have bytes to send, next one first.
    sending: VecDeque<FlowKey>,
    timers: BTreeSet<(Nanos, FlowKey)>,
    /// Flows offered or sent, and bytes sent and not acknowledged.
    flows_under_way: usize,
    bytes_under_way: usize,
    /// When more may begin, and how much until then.
    next_tick: Nanos,
    offers_left: usize,
    bytes_left: usize,
    last_number: u32,
    ended: Vec<Ended>,
}

impl Joins {
    /// The standby does not know this flow, or not enough of it.
    pub fn want(&mut self, flow: FlowKey, now: Nanos) {
        if self.joins.contains_key(&flow) {
            return;
        }
        let join = Join {
            number: 0,
            phase: Phase::Queued,
            attempts: 0,
            wanted_at: now,
            timer: None,
        };
        self.joins.insert(flow, join);
        self.queue.push_back(flow);
    }

    /// Handing it over does not help: it is not wanted again while this standby is there.
    pub fn give_up(&mut self, flow: FlowKey, now: Nanos) {
        self.want(flow, now);
        self.decline(flow, JoinResult::Failed, now);
    }

    /// Whether the flow is to be handed over, or could not be.
    pub fn concerns(&self, flow: &FlowKey) -> bool {
        self.joins.contains_key(flow)
    }

    /// Whether the standby was offered the flow: what it has of it, it is about to let go.
    pub fn is_under_way(&self, flow: &FlowKey) -> bool {
        let join = self.joins.get(flow);
        join.is_some_and(|join| join.phase.is_under_way())
    }

    /// Whether the standby has let go what it had of the flow, and the snapshot is still to be taken.
    pub fn is_empty_handed(&self, flow: &FlowKey) -> bool {
        let phase = self.joins.get(flow).map(|join| &join.phase);
        matches!(phase, Some(Phase::Asked))
    }

    /// The flow is no more.
    pub fn forget(&mut self, flow: &FlowKey) {
        self.set_phase(flow, Phase::Declined);
        self.set_timer(flow, None);
        self.joins.remove(flow);
    }

    /// The standby is another, or none: nothing that was under way is true any more.
    pub fn clear(&mut self) {
        let last_number = self.last_number;
        let ended = std::mem::take(&mut self.ended);
        *self = Self {
            last_number,
            ended,
            ..Self::default()
        };
    }

    /// Flows that wait for their turn, or are under way.
    pub fn waiting(&self) -> usize {
        let declined = |join: &&Join| !matches!(join.phase, Phase::Declined);
        self.joins.values().filter(declined).count()
    }

    /// What has ended since the last call.
    pub fn take_ended(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }

    /// Changes the phase of a join, and with it what is counted as under way.
    fn set_phase(&mut self, flow: &FlowKey, phase: Phase) {
        let Some(join) = self.joins.get_mut(flow) else {
            return;
        };
        if let Phase::Sending { acked, sent, .. } = &join.phase {
            self.bytes_under_way -= sent - acked;
        }
        self.flows_under_way -= usize::from(join.phase.is_under_way());
        self.flows_under_way += usize::from(phase.is_under_way());
        join.phase = phase;
    }

    fn set_timer(&mut self, flow: &FlowKey, at: Option<Nanos>) {
        let Some(join) = self.joins.get_mut(flow) else {
            return;
        };
        if let Some(known) = std::mem::replace(&mut join.timer, at) {
            self.timers.remove(&(known, *flow));
        }
        if let Some(at) = at {
            self.timers.insert((at, *flow));
        }
    }

    /// It came to nothing: later again, but not for ever.
    fn fail(&mut self, flow: FlowKey, now: Nanos) {
        let Some(join) = self.joins.get_mut(&flow) else {
            return;
        };
        join.attempts += 1;
        if join.attempts >= ATTEMPTS {
            self.decline(flow, JoinResult::Failed, now);
            return;
        }
        let pause = PAUSE << join.attempts;
        self.set_phase(&flow, Phase::Pausing);
        self.set_timer(&flow, Some(now + pause));
    }

    fn decline(&mut self, flow: FlowKey, result: JoinResult, now: Nanos) {
        self.set_phase(&flow, Phase::Declined);
        self.set_timer(&flow, None);
        if let Some(join) = self.joins.get(&flow) {
            let took = now.saturating_sub(join.wanted_at);
            self.ended.push(Ended { result, took });
        }
    }

    fn is(&self, flow: &FlowKey, number: u32) -> bool {
        let join = self.joins.get(flow);
        join.is_some_and(|join| join.number == number && join.phase.is_under_way())
    }

    /// The standby holds the first `next` bytes of a snapshot. Returns whether one is to be taken now.
    pub fn process_got(&mut self, flow: FlowKey, number: u32, next: u32, now: Nanos) -> bool {
        if !self.is(&flow, number) {
            return false;
        }
        let next = next as usize;
        match self.joins.get_mut(&flow).map(|join| &mut join.phase) {
            Some(Phase::Offered { .. }) if next == 0 => {
                self.set_phase(&flow, Phase::Asked);
                self.set_timer(&flow, Some(now + PATIENCE));
                return true;
            }
            Some(Phase::Sending {
                bytes,
                acked,
                sent,
                moved_at,
                pause,
            }) if next > *acked && next <= bytes.len() => {
                let (whole, fresh) = (bytes.len(), next - *acked);
                // What lies behind may have been sent before it was taken back.
                self.bytes_under_way -= fresh.min(*sent - *acked);
                *acked = next;
                *sent = next.max(*sent);
                *moved_at = now;
                *pause = REPEAT;
                if next == whole {
                    if let Some(join) = self.joins.get(&flow) {
                        let took = now.saturating_sub(join.wanted_at);
                        let result = JoinResult::Joined;
                        self.ended.push(Ended { result, took });
                    }
                    self.forget(&flow);
                } else {
                    self.set_timer(&flow, Some(now + REPEAT));
                }
            }
            _ => {}
        }
        false
    }

    /// The standby has no use for the flow. Returns whether this was its join.
    pub fn process_decline(&mut self, flow: FlowKey, number: u32, now: Nanos) -> bool {
        let known = self.is(&flow, number);
        if known {
            self.decline(flow, JoinResult::Declined, now);
        }
        known
    }

    /// The standby has lost what it kept of the flow. Returns whether this was its join, which is tried again.
    pub fn process_lost(&mut self, flow: FlowKey, number: u32, now: Nanos) -> bool {
        let known = self.is(&flow, number);
        if known {
            self.fail(flow, now);
        }
        known
    }

    /// Whether a snapshot with this number is waited for.
    pub fn awaits(&self, flow: &FlowKey, number: u32) -> bool {
        self.is(flow, number) && matches!(self.joins[flow].phase, Phase::Asked)
    }

    /// The snapshot that was to be taken; `None` if there is none.
    pub fn process_snapshot(
        &mut self,
        flow: FlowKey,
        number: u32,
        bytes: Option<Vec<u8>>,
        now: Nanos,
    ) {
        if !self.awaits(&flow, number) {
            return;
        }
        match bytes.filter(|bytes| (1..=MAX_SNAPSHOT).contains(&bytes.len())) {
            None => self.fail(flow, now),
            Some(bytes) => {
                let phase = Phase::Sending {
                    bytes,
                    acked: 0,
                    sent: 0,
                    moved_at: now,
                    pause: REPEAT,
                };
                self.set_phase(&flow, phase);
                self.set_timer(&flow, Some(now + REPEAT));
                self.sending.push_back(flow);
            }
        }
    }

    /// When [`Joins::poll`] is due, ns.
    pub fn next_wakeup(&self) -> Nanos {
        let timer = self.timers.first().map_or(Nanos::MAX, |(at, _)| *at);
        let begins = (!self.queue.is_empty() && self.flows_under_way < FLOWS_AT_ONCE)
            || (!self.sending.is_empty() && self.bytes_under_way < BYTES_AT_ONCE);
        if begins {
            timer.min(self.next_tick)
        } else {
            timer
        }
    }

    /// Says what is due. `offer` makes the record for a flow and the number of its late join.
    pub fn poll(
        &mut self,
        now: Nanos,
        mut offer: impl FnMut(FlowKey, u32) -> Option<Record>,
        records: &mut Vec<Record>,
    ) {
        while let Some(&(at, flow)) = self.timers.first()
            && at <= now
        {
            self.set_timer(&flow, None);
            self.repeat(flow, now, &mut offer, records);
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.offers_left = OFFERS_A_TICK;
            self.bytes_left = BYTES_A_TICK;
        }
        while self.offers_left > 0
            && self.flows_under_way < FLOWS_AT_ONCE
            && let Some(flow) = self.queue.pop_front()
        {
            self.offer(flow, now, &mut offer, records);
        }
        self.send(records);
    }

    fn offer(
        &mut self,
        flow: FlowKey,
        now: Nanos,
        offer: &mut impl FnMut(FlowKey, u32) -> Option<Record>,
        records: &mut Vec<Record>,
    ) {
        let waits =
            matches!(self.joins.get(&flow), Some(join) if matches!(join.phase, Phase::Queued));
        if !waits {
            return;
        }
        self.offers_left -= 1;
        self.last_number = self.last_number.wrapping_add(1);
        let join = self.last_number;
        let Some(offer) = offer(flow, join) else {
            return self.fail(flow, now);
        };
        if let Some(known) = self.joins.get_mut(&flow) {
            known.number = join;
        }
        let phase = Phase::Offered {
            since: now,
            pause: REPEAT,
        };
        self.set_phase(&flow, phase);
        self.set_timer(&flow, Some(now + REPEAT));
        records.push(offer);
    }

    /// The timer of a flow is due: it was not answered, or is to be tried again.
    fn repeat(
        &mut self,
        flow: FlowKey,
        now: Nanos,
        offer: &mut impl FnMut(FlowKey, u32) -> Option<Record>,
        records: &mut Vec<Record>,
    ) {
        let Some(join) = self.joins.get_mut(&flow) else {
            return;
        };
        let again = match &mut join.phase {
            Phase::Pausing => {
                self.set_phase(&flow, Phase::Queued);
                self.queue.push_back(flow);
                return;
            }
            Phase::Offered { since, pause } if now.saturating_sub(*since) < PATIENCE => {
                *pause = (*pause * 2).min(REPEAT_MOST);
                let again = now + *pause;
                records.extend(offer(flow, join.number));
                again
            }
            Phase::Sending {
                acked,
                sent,
                moved_at,
                pause,
                ..
            } if now.saturating_sub(*moved_at) < PATIENCE => {
                // From the last that is known to have come; nothing, if it is not its turn yet.
                *pause = (*pause * 2).min(REPEAT_MOST);
                let again = now + *pause;
                self.bytes_under_way -= *sent - *acked;
                *sent = *acked;
                if !self.sending.contains(&flow) {
                    self.sending.push_back(flow);
                }
                again
            }
            _ => return self.fail(flow, now),
        };
        self.set_timer(&flow, Some(again));
    }

    /// Sends parts as far as what is under way, and what may begin in this tick, allow: one record of each
    /// flow in turn.
    fn send(&mut self, records: &mut Vec<Record>) {
        while self.bytes_under_way < BYTES_AT_ONCE
            && self.bytes_left > 0
            && let Some(flow) = self.sending.pop_front()
        {
            let Some(Join {
                number,
                phase: Phase::Sending { bytes, sent, .. },
                ..
            }) = self.joins.get_mut(&flow)
            else {
                continue;
            };
            let end = bytes.len().min(*sent + MAX_PART_LEN);
            if *sent == end {
                continue;
            }
            records.push(Record::Part(Part {
                flow,
                join: *number,
                total: bytes.len() as u32,
                offset: *sent as u32,
                bytes: bytes[*sent..end].into(),
            }));
            let count = end - *sent;
            *sent = end;
            self.bytes_under_way += count;
            self.bytes_left = self.bytes_left.saturating_sub(count);
            self.sending.push_back(flow);
        }
    }
}
