//! Late join, the standby's half: flows that are older than this standby come as snapshots.
//!
//! ```text
//!  OFFER ──► arrival: keeps the flow's frames ──(all PARTs)──► shadow, made of the snapshot
//!              │                                                 │ then the frames that were kept
//!              └─(too much, too slow)──► LOST, unprotected       └──► CONFIRM
//! ```
//!
//! The active takes the snapshot when it has heard that the frames are kept. So what the client sends is
//! in the snapshot, or in a frame, or in both. Of a transfer at full speed more comes before the snapshot is
//! taken than is worth keeping: the oldest frames are let go, and the snapshot must prove to have their bytes.
//! What comes after it is bounded by the client's window, for the active's gate is closed then.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use rfsis_common::maps::{Direction, FlowKey};

use super::{Effects, Flow, Flows};
use crate::fault::faulty;
use crate::handler::{Output, Resumed};
use crate::heartbeat::Nanos;
use crate::lockstep::{before, later};
use crate::segment::{self, Segment};
use crate::shadow::{Context, Shadow};
use crate::sync::{MAX_SNAPSHOT, Offer, Part, Record, Snapshot};

const SECOND: Nanos = 1_000_000_000;

/// Flows that may arrive at a time; the active offers fewer.
const MAX_ARRIVALS: usize = 128;

/// Bytes of frames that are kept for one flow, twice the largest window that a service's socket offers; and of
/// frames and snapshots for all, what as many flows need as the active offers at a time.
const FRAMES_LIMIT: usize = 2 << 20;
const BYTES_LIMIT: usize = 64 << 20;

/// What a frame costs besides its bytes.
const FRAME_OVERHEAD: usize = 64;

/// An arrival that has not moved for so long is forgotten, ns.
const ARRIVAL_TIMEOUT: Nanos = 5 * SECOND;

/// A flow whose snapshot is under way.
#[derive(Debug)]
pub(super) struct Arrival {
    join: u32,
    /// Behind the last number that the active sent.
    next: u32,
    moved_at: Nanos,
    /// The snapshot as far as it came, then nothing.
    bytes: Vec<u8>,
    /// How many bytes came.
    got: u32,
    frames: VecDeque<Frame>,
    frame_bytes: usize,
    /// Behind the last byte of the client in the frames that were let go.
    let_go: Option<u32>,
}

#[derive(Debug)]
struct Frame {
    arrived: Nanos,
    direction: Direction,
    packet: Box<[u8]>,
    /// Behind its last byte, if it has any of the client's, or a FIN.
    end: Option<u32>,
}

impl Frame {
    fn memory(&self) -> usize {
        self.packet.len() + FRAME_OVERHEAD
    }
}

impl Arrival {
    fn memory(&self) -> usize {
        self.bytes.len() + self.frame_bytes
    }

    /// Lets the oldest frame go; returns how much memory that frees, `None` if there is no frame.
    fn let_go_oldest(&mut self) -> Option<usize> {
        let oldest = self.frames.pop_front()?;
        self.frame_bytes -= oldest.memory();
        if let Some(end) = oldest.end {
            self.let_go = Some(self.let_go.map_or(end, |known| later(known, end)));
        }
        Some(oldest.memory())
    }
}

impl Flows {
    /// The active offers a flow that this node does not know, or of which it lacks something.
    pub fn process_offer(&mut self, offer: &Offer, now: Nanos, fx: &mut impl Effects) {
        let now = self.advance(now);
        let Offer {
            flow,
            join,
            client_isn,
            next,
        } = *offer;
        if self.live {
            return;
        }
        if let Some(arrival) = self.arrivals.get(&flow)
            && arrival.join == join
        {
            let next = arrival.got;
            return self.tells.push(Record::Got { flow, join, next });
        }
        // One that comes late must not end a connection that is newer, or that has joined since.
        if let Some(Flow::Shadow(shadow)) = self.flows.get(&flow)
            && !shadow.has_ended()
            && (shadow.handshake().client_isn != client_isn || shadow.has_joined_since(join))
        {
            return;
        }
        // Whatever is here lacks bytes, and nothing of the flow is protected until all is there.
        self.drop_arrival(&flow);
        self.openings.remove(&flow);
        if let Some(Flow::Shadow(_)) = self.flows.get(&flow) {
            self.drop_bytes_of(flow);
            self.flows.remove(&flow);
            fx.release(flow);
        }
        self.note_unprotected(flow, next, now);
        let kind = self.config.services.get(&flow.service_port);
        if kind.is_none_or(|kind| kind.output() == Output::Observed) {
            return self.tells.push(Record::Decline { flow, join });
        }
        let shadows = self.flows.len() + self.openings.len();
        if shadows > self.config.max_flows || self.bytes >= self.config.max_bytes {
            self.refused += 1;
            return self.tells.push(Record::Decline { flow, join });
        }
        // At this bound the active says it again, and by then there is room.
        if self.arrivals.len() >= MAX_ARRIVALS {
            return;
        }
        let arrival = Arrival {
            join,
            next,
            moved_at: now,
            bytes: Vec::new(),
            got: 0,
            frames: VecDeque::new(),
            frame_bytes: 0,
            let_go: None,
        };
        self.arrivals.insert(flow, arrival);
        self.tells.push(Record::Got {
            flow,
            join,
            next: 0,
        });
    }

    /// The flow has no shadow yet, and perhaps never will. `next`: behind what the active has sent.
    fn note_unprotected(&mut self, flow: FlowKey, next: u32, now: Nanos) {
        if !self.flows.contains_key(&flow) {
            self.leave_unprotected(flow, None, now);
        }
        if let Some(Flow::Unprotected { sent, refused, .. }) = self.flows.get_mut(&flow) {
            *sent = Some(next);
            // The active knows.
            *refused = None;
        }
    }

    /// Bytes of a snapshot.
    pub fn process_part(&mut self, part: &Part, now: Nanos, fx: &mut impl Effects) {
        let now = self.advance(now);
        let (flow, join) = (part.flow, part.join);
        if self.live {
            return;
        }
        let Some(arrival) = self.arrivals.get_mut(&flow) else {
            // The last that was said of it is lost.
            if let Some(Flow::Shadow(shadow)) = self.flows.get(&flow)
                && shadow.joined() == Some(join)
            {
                let next = part.total;
                self.tells.push(Record::Got { flow, join, next });
            }
            return;
        };
        if arrival.join != join {
            return;
        }
        if part.offset == arrival.got && part.total as usize <= MAX_SNAPSHOT {
            arrival.bytes.extend_from_slice(&part.bytes);
            arrival.got += part.bytes.len() as u32;
            arrival.moved_at = now;
            self.arrival_bytes += part.bytes.len();
            if arrival.got >= part.total {
                return self.restore(flow, now, fx);
            }
        }
        if self.arrival_bytes > BYTES_LIMIT {
            self.lose_arrival(flow);
            return;
        }
        if !self.got.contains(&flow) {
            self.got.push(flow);
        }
    }

    /// Says how far the snapshots have come, once for each batch of datagrams.
    pub(super) fn take_got(&mut self, mut tell: impl FnMut(Record)) {
        for flow in self.got.drain(..) {
            if let Some(arrival) = self.arrivals.get(&flow) {
                tell(Record::Got {
                    flow,
                    join: arrival.join,
                    next: arrival.got,
                });
            }
        }
    }

    /// A frame of a flow whose snapshot is under way.
    pub(super) fn keep_frame(
        &mut self,
        flow: FlowKey,
        packet: &[u8],
        segment: &Segment<'_>,
        direction: Direction,
        now: Nanos,
    ) {
        let Some(arrival) = self.arrivals.get_mut(&flow) else {
            return;
        };
        // It begins another connection on the same ports.
        if segment.syn {
            self.lose_arrival(flow);
            return;
        }
        let has_bytes = !segment.payload.is_empty() || segment.fin;
        let frame = Frame {
            arrived: now,
            direction,
            packet: packet.into(),
            end: (direction == Direction::ToVip && has_bytes).then_some(segment.end()),
        };
        let cost = frame.memory();
        while arrival.frame_bytes + cost > FRAMES_LIMIT || self.arrival_bytes + cost > BYTES_LIMIT {
            let Some(freed) = arrival.let_go_oldest() else {
                // The others have taken all there is.
                self.lose_arrival(flow);
                return;
            };
            self.arrival_bytes -= freed;
        }
        arrival.frames.push_back(frame);
        arrival.frame_bytes += cost;
        self.arrival_bytes += cost;
    }

    /// What is kept of the flow is of no use any more: the active offers it again, if it still runs.
    fn lose_arrival(&mut self, flow: FlowKey) {
        if let Some(Arrival { join, .. }) = self.arrivals.get(&flow) {
            let join = *join;
            self.drop_arrival(&flow);
            self.tells.push(Record::Lost { flow, join });
        }
    }

    pub(super) fn drop_arrival(&mut self, flow: &FlowKey) {
        if let Some(arrival) = self.arrivals.remove(flow) {
            self.arrival_bytes -= arrival.memory();
        }
    }

    pub(super) fn drop_arrivals(&mut self) {
        self.arrivals.clear();
        self.arrival_bytes = 0;
        self.got.clear();
    }

    pub(super) fn sweep_arrivals(&mut self, now: Nanos) {
        let old: Vec<FlowKey> = self
            .arrivals
            .iter()
            .filter(|(_, arrival)| now.saturating_sub(arrival.moved_at) > ARRIVAL_TIMEOUT)
            .map(|(flow, _)| *flow)
            .collect();
        for flow in old {
            self.lose_arrival(flow);
        }
    }

    /// The snapshot is complete.
    fn restore(&mut self, flow: FlowKey, now: Nanos, fx: &mut impl Effects) {
        let Some(arrival) = self.arrivals.remove(&flow) else {
            return;
        };
        self.arrival_bytes -= arrival.memory();
        let (join, next) = (arrival.join, arrival.next);
        let snapshot = match Snapshot::parse(&arrival.bytes) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                tracing::warn!(?flow, %error, "the snapshot of a flow cannot be used");
                self.note_unprotected(flow, next, now);
                return self.tells.push(Record::Decline { flow, join });
            }
        };
        if arrival.let_go.is_some_and(|end| before(snapshot.ack, end)) {
            // Bytes are missing between the two.
            return self.tells.push(Record::Lost { flow, join });
        }
        if !self.insert_restored(flow, join, snapshot, now, fx) {
            self.note_unprotected(flow, next, now);
            self.tells.push(Record::Decline { flow, join });
            return;
        }
        for frame in arrival.frames {
            let Ok((_, segment)) = segment::parse(&frame.packet, frame.direction) else {
                continue;
            };
            match frame.direction {
                Direction::ToVip => self.process_client(flow, &segment, frame.arrived, fx),
                Direction::FromVip => self.process_active(flow, &segment, frame.arrived, fx),
            };
        }
        let got = arrival.got;
        self.note_touched(flow);
        self.tells.push(Record::Got {
            flow,
            join,
            next: got,
        });
    }

    /// Makes the shadow; false if the snapshot is of no use here, or there is no room.
    fn insert_restored(
        &mut self,
        flow: FlowKey,
        join: u32,
        mut snapshot: Snapshot,
        now: Nanos,
        fx: &mut impl Effects,
    ) -> bool {
        let Some(&kind) = self.config.services.get(&flow.service_port) else {
            return false;
        };
        let rest = match kind.restore(&snapshot.handler) {
            Ok(rest) => rest,
            Err(error) => {
                tracing::warn!(?flow, %error, "the snapshot of a flow cannot be used");
                return false;
            }
        };
        let rest = if faulty!(RestoreNoHandler) {
            kind.stream()
        } else {
            rest
        };
        let handler = Resumed::new(std::mem::take(&mut snapshot.output), Some(rest));
        if self.bytes >= self.config.max_bytes || !fx.protect(flow) {
            self.refused += 1;
            return false;
        }
        fx.warm(Ipv4Addr::from(flow.client_addr));
        let mut cx = Context {
            wire: &mut self.wire,
            scratch: &mut self.scratch,
            now,
            room: self.config.max_bytes.saturating_sub(self.bytes),
            out: &mut self.out,
            acks_are_true: self.config.copied,
        };
        let shadow = Shadow::restored(
            flow,
            self.config.vip,
            &snapshot,
            kind,
            Box::new(handler),
            join,
            self.shadow_isn,
            &mut cx,
        );
        self.bytes += shadow.bytes();
        self.flows.insert(flow, Flow::Shadow(Box::new(shadow)));
        true
    }
}
