//! A shadow of a connection that is older than this standby.

use std::net::Ipv4Addr;

use rfsis_common::maps::FlowKey;

use super::{Context, Handshake, Shadow, Source};
use crate::handler::{HandlerKind, StreamHandler};
use crate::lockstep::before;
use crate::segment::Segment;
use crate::sync::Snapshot;

/// Bytes that are fed at once: a packet's length has 16 bits.
const PIECE: usize = 16 * 1024;

impl Shadow {
    /// A shadow in the middle of a connection: its handshake is made up so that it ends exactly at the
    /// numbers of the snapshot. `join` is the number of the late join, `handler` first writes what the active's has written and the client has
    /// not acknowledged.
    #[expect(
        clippy::too_many_arguments,
        reason = "what every shadow needs, and what it goes on from"
    )]
    pub fn restored(
        flow: FlowKey,
        vip: Ipv4Addr,
        snapshot: &Snapshot,
        kind: HandlerKind,
        handler: Box<dyn StreamHandler>,
        join: u32,
        shadow_isn: u32,
        cx: &mut Context<'_>,
    ) -> Self {
        let (next, ack) = (snapshot.next, Some(snapshot.unacknowledged));
        let handshake = Handshake {
            client_isn: snapshot.client_isn(),
            active_isn: snapshot.active_isn(),
            client_window: snapshot.window.min(u16::MAX.into()) as u16,
            client: snapshot.client,
            active: snapshot.active,
            inferred: false,
            answered_at: cx.now,
            guarded: true,
        };
        let mut shadow = Self::new(flow, vip, handshake, kind, shadow_isn, cx);
        shadow.source = Source::Handler(handler);
        shadow.joined = Some(join);
        shadow.active_next = snapshot.sent;
        shadow.active_ack = snapshot.ack;
        shadow.active_edge = snapshot.edge;
        shadow.active_window = snapshot.edge.wrapping_sub(snapshot.ack);
        let window = snapshot.window >> shadow.client_shift();
        let segment = Segment {
            seq: next,
            ack,
            window: window.min(u16::MAX.into()) as u16,
            ..Segment::default()
        };
        shadow.process_client(&segment, cx);
        let mut seq = next;
        for payload in snapshot.input.chunks(PIECE) {
            let piece = Segment {
                seq,
                payload,
                ..segment
            };
            shadow.process_client(&piece, cx);
            seq = piece.end();
        }
        if snapshot.fin {
            let fin = Segment {
                seq,
                fin: true,
                ..segment
            };
            shadow.process_client(&fin, cx);
        }
        shadow
    }

    /// The late join that it was made by.
    pub fn joined(&self) -> Option<u32> {
        self.joined
    }

    /// Whether it was made by this late join, or a later one.
    pub fn has_joined_since(&self, join: u32) -> bool {
        self.joined.is_some_and(|joined| !before(joined, join))
    }
}
