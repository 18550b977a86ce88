//! Egress: who may speak for the VIP.
//!
//! What does not pass is `TC_ACT_STOLEN`, not `TC_ACT_SHOT`: the latter tells the local TCP that its
//! packet was dropped, and TCP shrinks its window. What passes is `TC_ACT_UNSPEC`, so that the host's
//! other filters still run (`net/sched/cls_bpf.c`, `cls_bpf_classify`: it goes on to the next filter,
//! and behind the last one the packet leaves).

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_STOLEN, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::warn;
use rfsis_common::ack_gate::AckGateVerdict;
use rfsis_common::frame::{TcpPart, classify, refused_udp_port};
use rfsis_common::maps::{HeldEvent, MirrorPeer};
use rfsis_common::verdict::{GateVerdict, gate_decide, is_syn_ack, tell_copy};

use crate::clock::now_ns;
use crate::maps::{
    APPROVED_FLOWS, DATAGRAM_PORTS, HELD, SERVICE_PORTS, count_gate, is_guarding, mirror_peer,
    node_state, vip, worth_logging,
};
use crate::skb::SkbFrame;
use crate::{ack_gate, mirror};

/// Filter on clsact egress.
#[classifier]
pub fn rfsis_gate(ctx: TcContext) -> i32 {
    let frame = classify(&SkbFrame(&ctx), vip());
    let now_ns = now_ns();
    let verdict = gate_decide(
        &frame,
        &node_state(),
        now_ns,
        // SAFETY: only presence is asked; the value is not read.
        |port| unsafe { SERVICE_PORTS.get(port).is_some() },
        // SAFETY: only presence is asked; the value is not read.
        |tcp| unsafe { APPROVED_FLOWS.get(tcp.flow).is_some() },
        || {
            refused_udp_port(&SkbFrame(&ctx), frame.l3_offset)
                // SAFETY: only presence is asked; the value is not read.
                .is_some_and(|port| unsafe { DATAGRAM_PORTS.get(port).is_some() })
        },
    );
    let verdict = tell_copy(verdict, mirror_peer(), || {
        ctx.load::<[u8; 6]>(0).ok().map(MirrorPeer::at)
    });
    let count = count_gate(verdict);
    match verdict {
        GateVerdict::Other | GateVerdict::Copy => TC_ACT_UNSPEC,
        GateVerdict::Passed => {
            let opens = frame.tcp().filter(|tcp| is_syn_ack(tcp));
            if let Some(tcp) = opens {
                // Fails where there is none, which is the usual case.
                let _ = APPROVED_FLOWS.remove(tcp.flow);
            }
            let verdict = ack_gate::judge(&ctx, &frame, now_ns);
            match verdict {
                AckGateVerdict::Held | AckGateVerdict::OpeningLost => return TC_ACT_STOLEN,
                AckGateVerdict::Opening if !mirror::mark_held(&ctx, &frame) => {
                    return TC_ACT_STOLEN;
                }
                // The standby has got it when it was held.
                AckGateVerdict::Released if opens.is_some() && is_guarding() => {
                    return TC_ACT_UNSPEC;
                }
                _ => {}
            }
            // In one place for all: twice in the program it takes more stack than Linux 6.1 grants.
            let intact = mirror::offer(&ctx, &frame, || now_ns);
            if matches!(verdict, AckGateVerdict::Opening) {
                TC_ACT_STOLEN
            } else if intact {
                TC_ACT_UNSPEC
            } else {
                TC_ACT_SHOT
            }
        }
        GateVerdict::Closed => TC_ACT_STOLEN,
        GateVerdict::Held => {
            if let Some(tcp) = frame.tcp() {
                report_held(&ctx, tcp, now_ns, count);
            }
            TC_ACT_STOLEN
        }
    }
}

/// A lost report costs little: TCP sends the FIN again.
#[inline(always)]
fn report_held(ctx: &TcContext, tcp: &TcpPart, at_ns: u64, count: u64) {
    let event = HeldEvent {
        at_ns,
        flow: tcp.flow,
        seq: tcp.seq,
        ack: tcp.ack,
        flags: u32::from(tcp.flags),
        reserved: 0,
    };
    if HELD.output::<HeldEvent>(event, 0).is_err() && worth_logging(count) {
        warn!(ctx, "held ring full: {} FIN or RST held on this CPU", count);
    }
}
