//! What must hold of the flows, whatever the network does.

use super::lab::*;
use super::*;
use smoltcp::wire::{TcpControl, TcpRepr};

use crate::wire::bare_repr;

fn lab() -> Lab {
    Lab::new(7)
}

/// Runs `plan` until the client got `got` bytes and sent `sent`, kills the active, goes on to the end.
fn survives(plan: Plan, tweaks: Tweaks, got: u64, sent: u64) -> Lab {
    let mut lab = lab();
    let conn = lab.connect(plan, tweaks);
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got >= got
        && lab.conns[conn].sent >= sent));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
    lab.finish();
    lab
}

#[test]
fn echo_goes_on_in_both_directions() {
    survives(Plan::echo(400_000), Tweaks::default(), 100_000, 0);
}

#[test]
fn typed_lines_are_echoed_across_the_crash() {
    survives(
        Plan::echo(2_000).typed(20, 7 * MS),
        Tweaks::default(),
        500,
        0,
    );
}

#[test]
fn an_idle_flow_goes_on_when_it_is_used_again() {
    let mut lab = lab();
    lab.connect(Plan::echo(100).typed(10, 10 * SECOND), Tweaks::default());
    lab.run_for(35 * SECOND);
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.spoke), (1, 0));
    lab.finish();
}

#[test]
fn chargen_goes_on() {
    survives(Plan::chargen(500_000), Tweaks::default(), 100_000, 0);
}

#[test]
fn chargen_goes_on_for_a_slow_reader_with_a_zero_window() {
    let tweaks = Tweaks {
        client_buffer: 8_000,
        ..Tweaks::default()
    };
    survives(
        Plan::chargen(200_000).slow(3_000, 40 * MS),
        tweaks,
        20_000,
        0,
    );
}

#[test]
fn chargen_goes_on_for_a_reader_that_wakes_up_after_the_crash() {
    let tweaks = Tweaks {
        client_buffer: 8_000,
        ..Tweaks::default()
    };
    let plan = Plan {
        reads_from: 20 * SECOND,
        ..Plan::chargen(200_000)
    };
    let mut lab = lab();
    lab.connect(plan, tweaks);
    lab.run_for(5 * SECOND);
    lab.fail_over(30 * MS);
    lab.finish();
}

#[test]
fn echo_goes_on_for_a_slow_reader() {
    let tweaks = Tweaks {
        client_buffer: 16_000,
        ..Tweaks::default()
    };
    survives(Plan::echo(300_000).slow(4_000, 20 * MS), tweaks, 40_000, 0);
}

#[test]
fn discard_goes_on_swallowing() {
    survives(
        Plan::discard(600_000),
        Tweaks {
            client_buffer: 16_000,
            ..Tweaks::default()
        },
        0,
        200_000,
    );
}

#[test]
fn a_half_closed_echo_comes_to_its_end() {
    let tweaks = Tweaks {
        client_buffer: 200_000,
        ..Tweaks::default()
    };
    let mut lab = lab();
    let conn = lab.connect(
        Plan::echo(150_000).half_close().slow(5_000, 10 * MS),
        tweaks,
    );
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].ended
        && lab.conns[conn].got > 20_000));
    lab.fail_over(30 * MS);
    lab.finish();
}

#[test]
fn a_half_closed_chargen_goes_on() {
    let mut lab = lab();
    let plan = Plan {
        ending: Ending::HalfClose,
        want: 200_000,
        ..Plan::chargen(0)
    };
    let conn = lab.connect(plan.slow(5_000, 10 * MS), Tweaks::default());
    lab.run_until(60 * SECOND, |lab| lab.conns[conn].got > 50_000);
    lab.fail_over(30 * MS);
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got > 300_000));
    assert_eq!(lab.told, []);
}

#[test]
fn daytime_read_to_the_end_goes_on_and_closes() {
    let mut lab = lab();
    let conn = lab.connect(Plan::daytime(10 * SECOND), Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].eof));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
    lab.finish();
}

#[test]
fn daytime_interrupted_is_reset() {
    let mut lab = lab();
    let conn = lab.connect(Plan::daytime(10 * SECOND), Tweaks::default());
    lab.lose_copy = Box::new(|segment, direction| direction == Direction::FromVip && segment.fin);
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].eof));
    let report = lab.fail_over(MS);
    assert_eq!(report.resets, [(ResetReason::Unpredictable, 1)]);
    assert!(lab.run_until(5 * SECOND, |lab| lab.conns[conn].reset));
}

#[test]
fn nothing_wrong_happens_whatever_the_options() {
    for bits in 0..8 {
        let tweaks = Tweaks {
            timestamps: bits & 1 > 0,
            window_scale: bits & 2 > 0,
            sack: bits & 4 > 0,
            ..Tweaks::default()
        };
        survives(Plan::echo(200_000), tweaks, 50_000, 0);
    }
}

#[test]
fn numbers_wrap_around_on_both_sides() {
    for (client, active) in [
        (-2000, -90_000),
        (-150_000, -1),
        (-1, -2000),
        (-60_000, 10_000),
    ] {
        let tweaks = Tweaks {
            client_isn: Some(client as u32),
            active_isn: Some(active as u32),
            ..Tweaks::default()
        };
        survives(Plan::echo(400_000), tweaks, 50_000, 0);
        survives(Plan::chargen(400_000), tweaks, 50_000, 0);
    }
}

#[test]
fn a_window_larger_than_the_shadows_is_kept_open() {
    let tweaks = Tweaks {
        client_buffer: 512 * 1024,
        active_buffer: 512 * 1024,
        ..Tweaks::default()
    };
    survives(Plan::discard(2 << 20), tweaks, 0, 1 << 20);
    // The handler stands still, so everything in flight is kept by the shadow.
    let plan = Plan {
        reads_from: 10 * SECOND,
        ..Plan::echo(2 << 20)
    };
    let mut lab = lab();
    lab.connect(plan, tweaks);
    lab.run_for(5 * SECOND);
    let report = lab.fail_over(30 * MS);
    assert_eq!(
        (report.live, report.resets.len()),
        (1, 0),
        "{report:?} {:?}",
        lab.flows
    );
    lab.finish();
}

#[test]
fn a_bad_network_changes_nothing() {
    for seed in 0..6 {
        let mut lab = Lab::new(seed);
        lab.faults = Faults {
            loss: 20,
            duplicates: 20,
            jitter: 3 * MS,
            tap_loss: 0,
            tap_swaps: 100,
        };
        lab.connect(Plan::echo(100_000), Tweaks::default());
        lab.connect(Plan::chargen(100_000), Tweaks::default());
        lab.connect(Plan::discard(100_000), Tweaks::default());
        lab.run_until(60 * SECOND, |lab| {
            lab.conns.iter().all(|c| c.got + c.sent > 30_000)
        });
        let report = lab.fail_over(30 * MS);
        assert_eq!(report.resets, []);
        lab.finish();
    }
}

/// Names the case that fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with RFSIS_SEED={}", self.0);
        }
    }
}

/// What became of one random history: flows that went on, flows that were reset.
fn history(seed: u64) -> (usize, usize) {
    let _named = Named(seed);
    let mut rng = Rng(seed);
    let mut lab = Lab::new(seed);
    // Each service has answered somebody before.
    for plan in [
        Plan::echo(1),
        Plan::chargen(1),
        Plan::discard(1),
        Plan::daytime(0),
    ] {
        lab.connect(plan, Tweaks::default());
    }
    lab.run_for(20 * SECOND);
    lab.events = 0;
    let rough = [0, 5, 30][rng.below(3) as usize];
    lab.faults = Faults {
        loss: rng.below(rough + 1),
        duplicates: rng.below(rough + 1),
        jitter: rng.below(5) * rng.below(MS),
        tap_loss: if rng.below(3) == 0 { rng.below(30) } else { 0 },
        tap_swaps: rng.below(100),
    };
    for _ in 0..=rng.below(4) {
        let size = 1 << rng.below(19);
        let plan = match rng.below(5) {
            0 => Plan::echo(size),
            1 => Plan::echo(size).half_close(),
            2 => Plan::chargen(size),
            3 => Plan::discard(size),
            _ => Plan::daytime(rng.below(3) * SECOND),
        };
        let plan = match rng.below(4) {
            0 => plan.slow(1 + (size as usize >> rng.below(6)), rng.below(30) * MS),
            1 => plan.typed(1 + (size as usize >> rng.below(6)), rng.below(30) * MS),
            2 => Plan {
                reads_from: SECOND + rng.below(3) * SECOND,
                ..plan
            },
            _ => plan,
        };
        let mut wrapping = || match rng.below(3) {
            0 => Some((rng.below(1 << 18) as u32).wrapping_neg()),
            1 => Some(rng.next() as u32),
            _ => None,
        };
        let tweaks = Tweaks {
            client_isn: wrapping(),
            active_isn: wrapping(),
            timestamps: rng.below(2) == 0,
            window_scale: rng.below(2) == 0,
            sack: rng.below(2) == 0,
            client_buffer: 2048 << rng.below(9),
            active_buffer: 4096 << rng.below(8),
        };
        lab.connect(plan, tweaks);
    }
    let latest = [40, 400, 3000][rng.below(3) as usize];
    let crash_at = rng.below(latest);
    lab.run_until(30 * SECOND, |lab| lab.events >= crash_at);
    let report = lab.fail_over(rng.below(100) * MS);
    lab.settle();
    if lab.faults.tap_loss == 0 {
        for conn in lab.conns.iter().filter(|conn| conn.plan.service != DAYTIME) {
            assert!(!conn.reset, "{conn:?} was reset: {report:?}");
        }
        // A late segment of a flow that has ended makes it one without a shadow: nobody is there.
        let lost = [ResetReason::Lagging, ResetReason::Diverged];
        assert!(
            report
                .resets
                .iter()
                .all(|(reason, _)| !lost.contains(reason)),
            "{report:?} {:?}",
            lab.conns
        );
    }
    (
        report.live,
        lab.conns.iter().filter(|conn| conn.reset).count(),
    )
}

#[test]
fn every_history_ends_exact_or_reset_and_reset_only_where_copies_were_lost() {
    if let Ok(seed) = std::env::var("RFSIS_SEED") {
        history(seed.parse().unwrap());
        return;
    }
    let (mut live, mut reset) = (0, 0);
    for seed in 0..HISTORIES {
        let (went_on, told) = history(seed);
        live += went_on;
        reset += told;
    }
    assert!(live > HISTORIES as usize, "{live} flows went on");
    assert!(reset > HISTORIES as usize / 100, "{reset} flows were reset");
}

const HISTORIES: u64 = 600;

/// Loses what `lost` says on the way, crashes after `wait`, goes on.
fn handshake_survives(wait: Nanos, lost: fn(&Segment<'_>, Direction) -> bool, live: usize) {
    for plan in [Plan::echo(5000), Plan::chargen(50_000), Plan::discard(5000)] {
        let mut lab = lab();
        lab.connect(plan, Tweaks::default());
        lab.lose = Box::new(lost);
        lab.run_for(wait);
        let report = lab.fail_over(10 * MS);
        lab.lose = Box::new(|_, _| false);
        assert_eq!((report.live, report.resets.len()), (live, 0), "{report:?}");
        lab.finish();
    }
}

#[test]
fn a_handshake_of_which_only_the_syn_was_seen_begins_anew() {
    handshake_survives(500_000, |_, direction| direction == Direction::FromVip, 0);
}

#[test]
fn a_handshake_goes_on_whether_the_client_has_the_syn_ack_or_not() {
    handshake_survives(500_000, |s, d| d == Direction::ToVip && !s.syn, 1);
    handshake_survives(120_000, |_, _| false, 1);
}

#[test]
fn an_opening_whose_answer_reached_the_standby_alone_goes_on() {
    let mut lab = lab();
    lab.connect(Plan::echo(5000), Tweaks::default());
    lab.run_for(70_000);
    // The SYN-ACK is on the wire: show it to the tap, and lose it for the client.
    lab.lose_at_client = true;
    lab.run_for(80_000);
    lab.lose_at_client = false;
    let report = lab.fail_over(MS);
    assert_eq!((report.live, report.spoke), (1, 1));
    lab.finish();
}

/// A service that has answered before, then a connection whose SYN-ACK the tap lost.
fn without_syn_ack(plan: Plan, primed: bool, tweaks: Tweaks) -> Lab {
    let mut lab = lab();
    if primed {
        lab.connect(
            Plan {
                upload: plan.upload.min(1),
                want: plan.want.min(1),
                ..plan
            },
            tweaks,
        );
        lab.run_for(20 * SECOND);
        assert!(lab.world.live.is_empty());
    }
    lab.lose_copy = Box::new(|s, d| d == Direction::FromVip && s.syn);
    let conn = lab.connect(plan, tweaks);
    assert!(
        lab.run_until(SECOND, |lab| lab.conns[conn].got + lab.conns[conn].sent
            > 3000)
    );
    lab
}

#[test]
fn a_lost_copy_of_the_syn_ack_is_made_up_from_the_services_last_answer() {
    for plan in [
        Plan::echo(90_000),
        Plan::chargen(90_000),
        Plan::discard(90_000),
    ] {
        let mut lab = without_syn_ack(plan, true, Tweaks::default());
        lab.fail_over(10 * MS);
        lab.finish();
    }
}

#[test]
fn a_flow_without_a_known_answer_is_reset_at_takeover() {
    let mut lab = without_syn_ack(Plan::echo(9_000_000), false, Tweaks::default());
    let report = lab.fail_over(10 * MS);
    assert_eq!(report.resets, [(ResetReason::Unprotected, 1)]);
    assert!(
        lab.run_until(MS, |lab| lab.conns[0].reset),
        "by the first RST"
    );
    lab.settle();
}

#[test]
fn a_syn_ack_copy_that_comes_after_the_ack_still_counts() {
    let mut hand = Hand::with(config(), ECHO);
    hand.client(0, TcpControl::Syn, b"", None);
    hand.client(1, TcpControl::None, b"", Some(1));
    hand.active(0, TcpControl::Syn, b"", Some(1));
    assert_eq!(hand.flows.census().lockstep, 1);
}

#[test]
fn a_lost_copy_makes_a_flow_lag_and_a_retransmission_heals_it() {
    let mut lab = lab();
    let conn = lab.connect(Plan::echo(1000).typed(100, 20 * MS), Tweaks::default());
    let mut lost = 0;
    lab.lose_copy = Box::new(move |s, d| {
        let hit = d == Direction::ToVip && !s.payload.is_empty() && lost == 0;
        lost += usize::from(hit);
        hit
    });
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 500));
    assert_eq!(lab.flows.census().lagging, 1);
    assert_eq!(lab.flows.census().lag_bytes, 500);
    let report = lab.fail_over(10 * MS);
    assert_eq!(report.resets, [(ResetReason::Lagging, 1)]);
    assert!(
        lab.run_until(MS, |lab| lab.conns[0].reset),
        "by the first RST"
    );
    lab.settle();

    // The active did not get it either: the client sends it again, and all have it.
    let mut lab = Lab::new(8);
    let conn = lab.connect(Plan::echo(1000).typed(100, 20 * MS), Tweaks::default());
    let mut lost = 0;
    lab.lose = Box::new(move |s, d| {
        let hit = d == Direction::ToVip && !s.payload.is_empty() && lost == 0;
        lost += usize::from(hit);
        hit
    });
    assert!(lab.run_until(9 * SECOND, |lab| lab.conns[conn].got >= 300));
    assert_eq!(lab.flows.census().lagging, 0);
    lab.fail_over(10 * MS);
    lab.finish();
}

#[test]
fn a_flow_that_lost_a_frame_in_the_ring_lags_until_the_active_acknowledges_what_is_held() {
    let mut hand = Hand::open(ECHO);
    hand.flows.mark_lost(hand.flow, hand.now);
    assert_eq!(hand.flows.census().lagging, 1);
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.active(1, TcpControl::Psh, b"abc", Some(4));
    assert_eq!(hand.flows.census().lockstep, 1);
}

#[test]
fn an_active_of_another_mind_makes_a_flow_diverge_and_it_is_reset() {
    let mut lab = lab();
    lab.other_mind = Some(HandlerKind::Chargen);
    lab.connect(
        Plan {
            reads_from: 99 * SECOND,
            ..Plan::echo(9000)
        },
        Tweaks::default(),
    );
    lab.run_for(100 * MS);
    assert_eq!(lab.flows.census().diverged, 1);
    let report = lab.fail_over(10 * MS);
    assert_eq!(report.resets, [(ResetReason::Diverged, 1)]);
    assert!(lab.run_until(SECOND, |lab| lab.conns[0].reset));
}

/// A standby and segments by hand. Numbers count from each side's initial sequence number.
struct Hand {
    flows: Flows,
    world: World,
    flow: FlowKey,
    now: Nanos,
}

const CLIENT_ISN: u32 = 0xffff_ff00;
const ACTIVE_ISN: u32 = 0x1234_5678;

impl Hand {
    fn with(config: FlowsConfig, service: u16) -> Self {
        Self {
            flows: Flows::new(config).unwrap(),
            world: World::default(),
            flow: crate::segment::flow_key(CLIENT, 50_000, service),
            now: SECOND,
        }
    }

    fn open(service: u16) -> Self {
        let mut hand = Self::with(config(), service);
        hand.shake();
        assert_eq!(hand.flows.census().lockstep, 1);
        hand
    }

    fn shake(&mut self) {
        self.client(0, TcpControl::Syn, b"", None);
        self.active(0, TcpControl::Syn, b"", Some(1));
        self.client(1, TcpControl::None, b"", Some(1));
    }

    fn client(
        &mut self,
        at: u32,
        control: TcpControl,
        data: &[u8],
        ack: Option<u32>,
    ) -> FrameResult {
        let repr = TcpRepr {
            seq_number: seq(CLIENT_ISN.wrapping_add(at)),
            ack_number: ack.map(|ack| seq(ACTIVE_ISN.wrapping_add(ack))),
            window_len: 60_000,
            payload: data,
            ..bare_repr(self.flow.client_port, self.flow.service_port, control)
        };
        self.show(&by_hand(&repr, Direction::ToVip), Direction::ToVip)
    }

    fn active(
        &mut self,
        at: u32,
        control: TcpControl,
        data: &[u8],
        ack: Option<u32>,
    ) -> FrameResult {
        let repr = TcpRepr {
            seq_number: seq(ACTIVE_ISN.wrapping_add(at)),
            ack_number: ack.map(|ack| seq(CLIENT_ISN.wrapping_add(ack))),
            window_len: 60_000,
            payload: data,
            ..bare_repr(self.flow.service_port, self.flow.client_port, control)
        };
        self.show(&by_hand(&repr, Direction::FromVip), Direction::FromVip)
    }

    fn show(&mut self, packet: &[u8], direction: Direction) -> FrameResult {
        self.now += MS;
        self.flows
            .process_frame(packet, direction, self.now, &mut self.world)
    }

    /// What the live shadows said: (number, flags and length, acknowledgement), from both ISNs.
    fn said(&mut self) -> Vec<(u32, &'static str, usize, u32)> {
        let sent = std::mem::take(&mut self.world.sent);
        let parsed = sent.iter().map(|packet| {
            let (_, s) = crate::segment::parse(packet, Direction::FromVip).unwrap();
            let flag = match (s.syn, s.fin, s.rst) {
                (true, ..) => "SYN",
                (_, true, _) => "FIN",
                (.., true) => "RST",
                _ => "",
            };
            let at = s.seq.wrapping_sub(ACTIVE_ISN);
            (
                at,
                flag,
                s.payload.len(),
                s.ack.map_or(0, |ack| ack.wrapping_sub(CLIENT_ISN)),
            )
        });
        parsed.collect()
    }

    fn live(&mut self) -> TakeoverReport {
        self.flows.go_live(self.now, &mut self.world)
    }
}

#[test]
fn forged_segments_change_nothing() {
    let mut hand = Hand::open(ECHO);
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.active(1, TcpControl::Psh, b"abc", Some(4));
    let before = format!("{:?}", hand.flows.flows[&hand.flow]);
    let far = 1 << 25;
    hand.client(5, TcpControl::Rst, b"", None);
    hand.client(3, TcpControl::Rst, b"", Some(1));
    hand.client(0, TcpControl::Rst, b"", None);
    hand.client(far, TcpControl::Psh, b"evil", Some(1));
    hand.client(0u32.wrapping_sub(far), TcpControl::Psh, b"evil", Some(1));
    hand.client(4, TcpControl::Psh, b"evil", Some(far));
    hand.client(4, TcpControl::None, b"", Some(60_000));
    hand.client(77, TcpControl::Syn, b"", None);
    hand.client(78, TcpControl::Psh, b"evil", None);
    hand.client(1, TcpControl::Psh, b"xyz", Some(1));
    assert_eq!(format!("{:?}", hand.flows.flows[&hand.flow]), before);
    assert_eq!(hand.live().live, 1);
    assert_eq!(hand.said(), [(1, "", 3, 4)], "the echo, and no byte more");
    // Live: answered with the right numbers at the most.
    for ack in [60_000, 60_001, far] {
        hand.client(4, TcpControl::None, b"", Some(ack));
        hand.client(5, TcpControl::Rst, b"", None);
        hand.client(4, TcpControl::None, b"", Some(4));
        assert!(hand.said().iter().all(|said| *said == (4, "", 0, 4)));
    }
    hand.client(4, TcpControl::Rst, b"", Some(4));
    assert!(hand.world.live.is_empty(), "the true RST ends it");
}

#[test]
fn a_client_that_has_more_than_the_shadow_can_write_is_told() {
    let mut hand = Hand::open(ECHO);
    assert_eq!(hand.live().live, 1);
    for _ in 0..4 {
        hand.client(101, TcpControl::Psh, b"x", Some(101));
    }
    assert_eq!(hand.said().last(), Some(&(101, "RST", 0, 1)));
    assert!(hand.world.live.is_empty() && hand.flows.flows.is_empty());
}

#[test]
fn bounds_leave_new_flows_unprotected_and_old_ones_alone() {
    for config in [
        FlowsConfig {
            max_flows: 3,
            ..config()
        },
        FlowsConfig {
            max_bytes: 1,
            ..config()
        },
    ] {
        let by_bytes = config.max_bytes == 1;
        let mut hand = Hand::with(config, CHARGEN);
        for port in 0..5 {
            hand.flow.client_port = 1000 + port;
            hand.shake();
        }
        let kept = if by_bytes { 1 } else { 3 };
        assert_eq!(hand.flows.refused(), 5 - kept);
        assert_eq!(hand.world.live.len(), kept as usize);
        assert!((0..kept as u16).all(|port| {
            hand.flow.client_port = 1000 + port;
            hand.world.live.contains(&hand.flow)
        }));
        let report = hand.live();
        assert_eq!(report.live, kept as usize);
        assert_eq!(
            report.resets,
            [(ResetReason::Unprotected, 5 - kept as usize)]
        );
    }
    // The map is full.
    let mut hand = Hand::with(config(), ECHO);
    hand.world.live_limit = Some(0);
    hand.shake();
    assert_eq!(
        (hand.flows.refused(), hand.flows.census().unprotected),
        (1, 1)
    );
}

#[test]
fn a_syn_flood_stays_bounded_and_leaves_flows_alone() {
    let mut hand = Hand::open(ECHO);
    let kept = hand.flow;
    for at in 0..100_000u32 {
        hand.flow = FlowKey {
            client_addr: at,
            client_port: 9,
            service_port: ECHO,
        };
        let syn = TcpRepr {
            seq_number: seq(CLIENT_ISN),
            ..bare_repr(9, ECHO, TcpControl::Syn)
        };
        let answer = TcpRepr {
            seq_number: seq(ACTIVE_ISN),
            ack_number: Some(seq(CLIENT_ISN.wrapping_add(1))),
            ..bare_repr(ECHO, 9, TcpControl::Syn)
        };
        let caps = smoltcp::phy::ChecksumCapabilities::default();
        let mut bytes = vec![];
        crate::wire::emit_packet(&mut bytes, at.into(), VIP, &syn, &caps);
        hand.show(&bytes, Direction::ToVip);
        if at % 2 == 0 {
            crate::wire::emit_packet(&mut bytes, VIP, at.into(), &answer, &caps);
            hand.show(&bytes, Direction::FromVip);
        }
        assert!(hand.flows.openings.len() <= MAX_OPENINGS);
        assert!(hand.world.live.len() <= MAX_OPENINGS / 2 + 2);
    }
    assert!(hand.world.live.contains(&kept));
    assert!(hand.flows.opening_order.len() <= MAX_OPENINGS);
    hand.flows.poll(hand.now + OPENING_TIMEOUT, &mut hand.world);
    assert_eq!(hand.world.live.iter().collect::<Vec<_>>(), [&kept]);
    hand.flow = kept;
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.live();
    assert_eq!(hand.said(), [(1, "", 3, 4)]);
}

#[test]
fn ports_may_be_used_again_on_the_standby_and_after_a_takeover() {
    let mut lab = lab();
    for round in 0..4 {
        if round == 2 {
            lab.fail_over(10 * MS);
        }
        let isn = Some(1000u32.wrapping_sub(round * 500_000));
        let tweaks = Tweaks {
            client_isn: isn,
            ..Tweaks::default()
        };
        let conn = lab.connect_from(40_000, Plan::echo(3000), tweaks);
        lab.run_until(60 * SECOND, |lab| lab.conns[conn].eof);
        lab.run_for(20 * SECOND);
    }
    lab.finish();
}

#[test]
fn a_new_syn_on_the_ports_of_a_flow_in_time_wait_finds_the_kernel() {
    let mut hand = Hand::open(DAYTIME);
    hand.active(1, TcpControl::Fin, b"now", Some(1));
    hand.client(1, TcpControl::Fin, b"", Some(5));
    hand.active(5, TcpControl::None, b"", Some(2));
    let report = hand.live();
    assert_eq!(
        (report.live, report.spoke, report.resets.len()),
        (1, 0, 0),
        "{report:?}"
    );
    hand.client(500, TcpControl::Syn, b"", None);
    assert!(hand.world.live.is_empty() && hand.said().is_empty());
}

#[test]
fn what_has_ended_or_is_idle_is_reaped() {
    for live in [false, true] {
        let mut hand = Hand::open(DAYTIME);
        hand.active(1, TcpControl::Fin, b"now", Some(1));
        hand.client(1, TcpControl::Fin, b"", Some(5));
        hand.active(5, TcpControl::None, b"", Some(2));
        if live {
            hand.live();
        }
        hand.flows
            .poll(hand.now + TIME_WAIT - SECOND, &mut hand.world);
        assert_eq!(hand.world.live.len(), 1);
        hand.flows
            .poll(hand.now + TIME_WAIT + SECOND, &mut hand.world);
        assert!(hand.world.live.is_empty() && hand.flows.flows.is_empty());

        let mut hand = Hand::open(ECHO);
        if live {
            hand.live();
        }
        hand.flows
            .poll(hand.now + config().idle_timeout, &mut hand.world);
        assert_eq!(hand.world.live.len(), 1);
        hand.flows
            .poll(hand.now + config().idle_timeout + SECOND, &mut hand.world);
        assert!(hand.world.live.is_empty() && hand.flows.flows.is_empty());
    }
}

#[test]
fn a_node_that_yields_forgets_everything() {
    let mut hand = Hand::open(CHARGEN);
    hand.flow.client_port = 1;
    hand.client(0, TcpControl::Syn, b"", None);
    hand.active(0, TcpControl::Syn, b"", Some(1));
    assert_eq!(hand.world.live.len(), 2);
    hand.live();
    hand.flows.go_standby(&mut hand.world);
    assert!(hand.world.live.is_empty());
    assert_eq!(hand.flows.census(), Census::default());
    hand.shake();
    assert_eq!(hand.flows.census().lockstep, 1, "it is a standby again");
}

#[test]
fn a_held_fin_goes_only_on_a_live_node_and_only_for_the_kernels_flows() {
    let mut hand = Hand::open(ECHO);
    let mine = hand.flow;
    let held = |port, flags| HeldEvent {
        flow: FlowKey {
            client_port: port,
            ..mine
        },
        seq: 77,
        ack: 99,
        flags,
        ..HeldEvent::default()
    };
    assert!(
        !hand.flows.process_held(&held(1, 1), &mut hand.world),
        "standby"
    );
    hand.live();
    assert!(
        !hand
            .flows
            .process_held(&held(mine.client_port, 1), &mut hand.world)
    );
    assert!(hand.world.approved.is_empty() && hand.world.sent.is_empty());
    assert!(hand.flows.process_held(&held(1, 1), &mut hand.world));
    assert!(hand.world.sent.is_empty(), "the kernel repeats a FIN");
    assert!(hand.flows.process_held(&held(2, 4 | 16), &mut hand.world));
    let sent = hand.said();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].1, "RST");
    assert_eq!(sent[0].0.wrapping_add(ACTIVE_ISN), 77);
}

#[test]
fn of_ten_thousand_flows_only_those_speak_that_must() {
    let mut hand = Hand::with(config(), ECHO);
    for port in 1..=10_000 {
        hand.flow.client_port = port;
        hand.shake();
        if port % 1000 == 0 {
            hand.client(1, TcpControl::Psh, b"abc", Some(1));
        } else if port % 2 == 0 {
            hand.client(1, TcpControl::Psh, b"abc", Some(1));
            hand.active(1, TcpControl::Psh, b"abc", Some(4));
            hand.client(4, TcpControl::None, b"", Some(4));
        }
    }
    let report = hand.live();
    assert_eq!(
        (report.live, report.spoke, report.resets.len()),
        (10_000, 10, 0)
    );
    assert_eq!(hand.said(), [(1, "", 3, 4); 10]);
    assert_eq!(hand.flows.timers.len(), 10, "idle flows cost no timer");
}
