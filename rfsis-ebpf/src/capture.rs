//! What the agent gets of the frames that come in, whichever hook has caught them.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
};
use aya_log_ebpf::warn;
use rfsis_common::ack_gate::is_opening;
use rfsis_common::agree::Answer;
use rfsis_common::frame::{Classified, Frame, TcpPart};
use rfsis_common::maps::{
    Direction, FRAME_HEADER_LEN, FRAME_SLOTS, FrameHeader, HEARTBEAT_CAPTURE, HeartbeatEvent,
    NodeState, State, frame_flags,
};
use rfsis_common::mirror::{HELD_URGENT, URGENT_OFFSET};
use rfsis_common::pledge::is_plain;
use rfsis_common::verdict::{Wake, XdpAction, XdpVerdict, is_syn_ack, wake_decide, xdp_decide};

use crate::clock::now_ns;
use crate::maps::{
    FRAMES, HEARTBEATS, LIVE_FLOWS, LOST_FLOWS, count_xdp, end_rest, node_state, rest_until,
    worth_logging,
};

/// A frame at a hook.
pub trait Captured: Frame {
    /// What the kernel gave the program.
    type Context: EbpfContext;

    /// For the log.
    fn context(&self) -> &Self::Context;

    /// Interface that the frame came in on.
    fn ifindex(&self) -> u32;

    /// Copies `len` bytes from `offset` on; `false` where they are not there.
    ///
    /// # Safety
    /// `to` has room for them.
    unsafe fn copy(&self, offset: u32, to: *mut u8, len: u32) -> bool;

    /// Notes a SYN that is in the ring.
    fn note_syn(&self, _tcp: &TcpPart) {}

    /// What the active's kernel may be told of the copy of a SYN-ACK that is held, once that is in the ring, too.
    /// Nothing, where the hook cannot answer: then the agent does.
    fn promise(&self, _tcp: &TcpPart, _now_ns: u64) -> Option<Answer> {
        None
    }

    /// Tells it. The frame is no more.
    fn tell(&self, _answer: &Answer) {}

    /// Confirms bytes that are in the ring, where there is a pledge. The frame may be no more.
    fn confirm(&self, _class: &Classified, _tcp: &TcpPart, _now_ns: u64) {}
}

/// Decides, copies and counts; `true` if the frame goes on to the kernel.
#[inline(always)]
pub fn capture(frame: &impl Captured, class: &Classified) -> bool {
    let node = node_state();
    // SAFETY: only presence is asked; the value is not read.
    let action = xdp_decide(class, node.state(), |tcp| unsafe {
        LIVE_FLOWS.get(tcp.flow).is_some()
    });
    match action {
        XdpAction::Pass(verdict) => {
            count_xdp(verdict);
            true
        }
        XdpAction::Mirror => {
            mirror(frame, class, &node);
            false
        }
        XdpAction::Heartbeat => {
            heartbeat(frame);
            false
        }
    }
}

/// Copies a frame to the ring; where that fails, says which flow lost it.
#[inline(always)]
fn mirror(frame: &impl Captured, class: &Classified, node: &NodeState) {
    let mut header = FrameHeader {
        arrival_ns: now_ns(),
        len: frame.frame_len() as u32,
        ifindex: frame.ifindex(),
        direction: class.direction as u16,
        state: node.state() as u16,
        l3_offset: class.l3_offset as u16,
        flags: 0,
    };
    let is_held = is_held(frame, class);
    let is_standby = matches!(node.state(), State::Standby);
    let answer = match class.tcp() {
        Some(tcp) if is_held && is_standby => frame.promise(tcp, header.arrival_ns),
        _ => None,
    };
    if answer.is_some() {
        header.flags |= frame_flags::ANSWERED;
    }
    // Who waits for an answer that is about to be given needs no agent.
    if copy_to_ring(frame, &header, is_held && answer.is_none()) {
        if let Some(answer) = answer {
            frame.tell(&answer);
        } else if let Some(tcp) = class.tcp()
            && matches!(class.direction, Direction::ToVip)
            && is_standby
        {
            if is_opening(tcp) {
                frame.note_syn(tcp);
            } else if is_plain(tcp) {
                frame.confirm(class, tcp, header.arrival_ns);
            }
        }
        let count = count_xdp(XdpVerdict::Mirrored);
        if node.state >= State::ALL.len() as u64 && worth_logging(count) {
            warn!(
                frame.context(),
                "STATE holds {}, which is no state: read as standby", node.state
            );
        }
        return;
    }
    let count = count_xdp(XdpVerdict::MirrorLost);
    if let Some(tcp) = class.tcp() {
        // Cannot fail: an LRU map makes room.
        let _ = LOST_FLOWS.insert(tcp.flow, header.arrival_ns, 0);
    }
    if worth_logging(count) {
        warn!(
            frame.context(),
            "frame ring full: {} copies lost on this CPU, the last of {} bytes", count, header.len
        );
    }
}

/// The smallest slot that holds the frame: a reservation is of constant size.
#[inline(always)]
fn copy_to_ring(frame: &impl Captured, header: &FrameHeader, held: bool) -> bool {
    const ROOM: [usize; 4] = [
        FRAME_SLOTS[0] - FRAME_HEADER_LEN,
        FRAME_SLOTS[1] - FRAME_HEADER_LEN,
        FRAME_SLOTS[2] - FRAME_HEADER_LEN,
        FRAME_SLOTS[3] - FRAME_HEADER_LEN,
    ];
    let len = header.len as usize;
    if len <= ROOM[0] {
        copy_to_slot::<{ ROOM[0] }>(frame, header, held)
    } else if len <= ROOM[1] {
        copy_to_slot::<{ ROOM[1] }>(frame, header, held)
    } else if len <= ROOM[2] {
        copy_to_slot::<{ ROOM[2] }>(frame, header, held)
    } else {
        copy_to_slot::<{ ROOM[3] }>(frame, header, held)
    }
}

/// Most bytes, and the last offset, of one `bpf_xdp_load_bytes` (`bpf_xdp_pointer` in
/// net/core/filter.c). A super-frame with its Ethernet header may be longer: it takes two.
const LOAD_MAX: usize = 0xffff;
const HALF: u32 = 0x8000;

#[repr(C)]
struct Slot<const ROOM: usize> {
    header: FrameHeader,
    frame: [u8; ROOM],
}

#[inline(always)]
fn copy_to_slot<const ROOM: usize>(
    frame: &impl Captured,
    header: &FrameHeader,
    held: bool,
) -> bool {
    let Some(mut slot) = FRAMES.reserve::<Slot<ROOM>>(0) else {
        return false;
    };
    let slot_ptr = slot.as_mut_ptr();
    // SAFETY: the slot is ours until submitted; the header is written, the frame's `header.len`
    // bytes by `copy`. The rest of the slot is never read: readers go by `len`.
    let copied = unsafe {
        (&raw mut (*slot_ptr).header).write(*header);
        let to: *mut u8 = (&raw mut (*slot_ptr).frame).cast();
        if ROOM <= LOAD_MAX || header.len as usize <= LOAD_MAX {
            copy(frame, 0, to, header.len, ROOM as u32)
        } else {
            copy(frame, 0, to, HALF, ROOM as u32)
                && copy(
                    frame,
                    HALF,
                    to.add(HALF as usize),
                    header.len - HALF,
                    ROOM as u32 - HALF,
                )
        }
    };
    if copied {
        slot.submit(wake(header, held));
    } else {
        slot.discard(0);
    }
    copied
}

/// Whether it is the copy of a SYN-ACK that the ACK gate holds: a client waits for what the standby says of it.
#[inline(always)]
fn is_held(frame: &impl Captured, class: &Classified) -> bool {
    let Some(tcp) = class.tcp() else {
        return false;
    };
    matches!(class.direction, Direction::FromVip)
        && is_syn_ack(tcp)
        && frame.load::<2>(tcp.offset + URGENT_OFFSET) == Some(HELD_URGENT.to_be_bytes())
}

#[inline(always)]
fn wake(header: &FrameHeader, held: bool) -> u64 {
    match wake_decide(header.len, held, header.arrival_ns, rest_until()) {
        Wake::WhenCaughtUp => 0,
        Wake::Now => {
            end_rest();
            u64::from(BPF_RB_FORCE_WAKEUP)
        }
        Wake::Later => u64::from(BPF_RB_NO_WAKEUP),
    }
}

/// Copies `len` bytes of the frame from `offset` on; `false` where they do not fit or are not there.
///
/// # Safety
/// `to` has `room` bytes.
#[inline(always)]
unsafe fn copy(frame: &impl Captured, offset: u32, to: *mut u8, len: u32, room: u32) -> bool {
    // Opaque to the optimiser, so that the bounds below are tested on the very register that the
    // helper gets: the verifier knows the range of a register, not of the value it was made from.
    // Before Linux 6.8 it learns nothing from a comparison with 0 that fails, either, and the helper
    // refuses a length that may be 0: so the length less one is bounded, and one is added.
    let last = core::hint::black_box(len.wrapping_sub(1));
    if last >= room {
        return false;
    }
    let len = last + 1;
    // SAFETY: `to` has `room` bytes, `len` is no more, and not 0.
    unsafe { frame.copy(offset, to, len) }
}

#[inline(always)]
fn heartbeat(frame: &impl Captured) {
    let Some(mut event) = HEARTBEATS.reserve::<HeartbeatEvent>(0) else {
        let count = count_xdp(XdpVerdict::HeartbeatLost);
        if worth_logging(count) {
            warn!(
                frame.context(),
                "heartbeat ring full: {} lost on this CPU", count
            );
        }
        return;
    };
    let len = (frame.frame_len() as u32).min(HEARTBEAT_CAPTURE as u32);
    let event_ptr = event.as_mut_ptr();
    // SAFETY: the event is ours until submitted; its integers are written here, `len` bytes of the
    // frame by `copy`, and readers go by `len`.
    let copied = unsafe {
        (&raw mut (*event_ptr).arrival_ns).write(now_ns());
        (&raw mut (*event_ptr).len).write(len);
        (&raw mut (*event_ptr).ifindex).write(frame.ifindex());
        copy(
            frame,
            0,
            (&raw mut (*event_ptr).frame).cast(),
            len,
            HEARTBEAT_CAPTURE as u32,
        )
    };
    if copied {
        event.submit(0);
        count_xdp(XdpVerdict::Heartbeat);
    } else {
        event.discard(0);
        count_xdp(XdpVerdict::HeartbeatLost);
    }
}
