//! Late join: a standby that starts while connections run gets each of them, whatever they are about, and
//! whatever gets lost on the way. At any step after, the active may die.

use super::*;
use crate::metrics::JoinResult;
use crate::segment::flow_key;
use crate::sync::{MAX_SNAPSHOT, Offer, Part, Snapshot};

impl Lab {
    fn guard_census(&self) -> crate::guard::GuardCensus {
        self.gate.as_ref().unwrap().guard.census()
    }

    /// How the late joins since the last call have ended.
    fn joins(&mut self) -> Vec<JoinResult> {
        let ended = self.gate.as_mut().unwrap().guard.take_joins();
        ended.into_iter().map(|ended| ended.result).collect()
    }

    /// All flows of the active are guarded, and as many are in lockstep.
    fn is_redundant(&self, flows: usize) -> bool {
        let census = self.guard_census();
        census.guarded == flows && census.exposed == 0 && self.flows.census().lockstep == flows
    }
}

/// A standby that starts when half of `plan` is done.
fn joins_half_way(plan: Plan, tweaks: Tweaks) {
    for seed in 0..5 {
        let mut lab = Lab::guarded(seed);
        let conn = lab.connect(plan, tweaks);
        let (sent, got) = (plan.upload / 2, plan.want / 2);
        assert!(lab.run_until(60 * SECOND, |lab| {
            lab.conns[conn].sent >= sent && lab.conns[conn].got >= got
        }));
        lab.restart_standby();
        assert!(
            lab.run_until(SECOND, |lab| lab.is_redundant(1)),
            "{plan:?} {:?} {:?}",
            lab.guard_census(),
            lab.flows.census()
        );
        assert_eq!(lab.joins(), [JoinResult::Joined]);
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
        lab.finish();
    }
}

const PLAIN: Tweaks = Tweaks {
    timestamps: false,
    window_scale: false,
    sack: false,
    client_isn: Some(u32::MAX - 1000),
    active_isn: Some(u32::MAX - 100_000),
    client_buffer: 30_000,
    active_buffer: 60_000,
};

#[test]
fn an_upload_joins_late() {
    joins_half_way(
        Plan::discard(10_000_000).typed(50_000, MS),
        Tweaks::default(),
    );
    joins_half_way(Plan::discard(2_000_000).typed(10_000, MS), PLAIN);
}

#[test]
fn a_download_joins_late() {
    joins_half_way(
        Plan::chargen(10_000_000).slow(50_000, MS),
        Tweaks::default(),
    );
    joins_half_way(Plan::chargen(2_000_000).slow(10_000, MS), PLAIN);
}

#[test]
fn an_echo_joins_late_whether_it_is_fast_or_typed() {
    joins_half_way(Plan::echo(10_000_000).typed(50_000, MS), Tweaks::default());
    joins_half_way(Plan::echo(2_000_000).typed(10_000, MS), PLAIN);
    for tweaks in [Tweaks::default(), PLAIN] {
        joins_half_way(Plan::echo(100_000).typed(100, MS), tweaks);
    }
}

/// Its buffers are full, on both sides of the handler, and more than a shadow's stack can hold.
#[test]
fn an_echo_that_nobody_reads_joins_late_with_every_byte_on_its_way() {
    let plan = Plan {
        reads_from: 3 * SECOND,
        ..Plan::echo(2_000_000)
    };
    for plan in [plan, plan.half_close()] {
        let mut lab = Lab::guarded(1);
        let conn = lab.connect(plan, Tweaks::default());
        lab.run_for(SECOND);
        assert!((300_000..2_000_000).contains(&lab.conns[conn].sent));
        lab.restart_standby();
        assert!(lab.run_until(SECOND, |lab| lab.is_redundant(1)));
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
        lab.finish();
    }
}

/// The client has closed its side, and its last bytes wait for the handler.
#[test]
fn a_half_closed_connection_joins_late() {
    let plan = Plan {
        reads_from: 3 * SECOND,
        ..Plan::echo(600_000).half_close()
    };
    let mut lab = Lab::guarded(2);
    let conn = lab.connect(plan, Tweaks::default());
    lab.run_for(SECOND);
    assert!(lab.conns[conn].ended && lab.conns[conn].got == 0);
    let snapshot = lab.snapshot(lab.conns[conn].flow()).unwrap();
    assert!(snapshot.fin && snapshot.input.len() > 16_384);
    lab.restart_standby();
    assert!(lab.run_until(SECOND, |lab| lab.is_redundant(1)));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
    lab.finish();
}

#[test]
fn an_idle_connection_joins_late_though_the_tap_shows_nothing_of_it() {
    let plan = Plan::echo(200).typed(100, 30 * SECOND);
    let mut lab = Lab::guarded(3);
    let conn = lab.connect(plan, Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got == 100));
    lab.run_for(SECOND);
    lab.restart_standby();
    assert_eq!(lab.flows.census().lockstep, 0);
    assert!(lab.run_until(SECOND, |lab| lab.is_redundant(1)));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.spoke), (1, 0), "it has nothing to say");
    lab.finish();
}

/// The gate hears of a connection by its SYN-ACK, and notes nothing of what the kernel sends before the agent
/// has told it of the flow.
#[test]
fn a_connection_that_spoke_before_its_gate_knew_it_joins_late() {
    let mut lab = Lab::guarded(4);
    let conn = lab.connect(Plan::echo(200).typed(100, 30 * SECOND), Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got == 100));
    lab.run_for(SECOND);
    let flow = lab.conns[conn].flow();
    lab.gate.as_mut().unwrap().unsee(flow, 100);
    lab.restart_standby();
    assert!(lab.run_until(SECOND, |lab| lab.is_redundant(1)));
    lab.fail_over(30 * MS);
    lab.finish();
}

/// The same of a flow that a standby knows, which was silent meanwhile and lacks the last that came: what that
/// confirms is more than the gate has noted, and less than the client was told.
#[test]
fn a_connection_that_spoke_before_its_gate_knew_it_is_guarded_when_all_is_held_and_not_before() {
    for goes_on in [false, true] {
        let mut lab = Lab::guarded(12);
        lab.gate.as_mut().unwrap().silent_standby = true;
        lab.run_for(50 * MS);
        let plan = Plan::echo(400).typed(100, SECOND);
        let conn = lab.connect(plan, Tweaks::default());
        assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got == 100));
        lab.faults.tap_loss = 1000;
        assert!(lab.run_until(2 * SECOND, |lab| lab.conns[conn].got == 200));
        lab.run_for(100 * MS);
        let flow = lab.conns[conn].flow();
        let gate = lab.gate.as_mut().unwrap();
        gate.unsee(flow, 200);
        if goes_on {
            // Now the gate notes all of it.
            assert!(lab.run_until(2 * SECOND, |lab| lab.conns[conn].got == 300));
        }
        lab.faults.tap_loss = 0;
        lab.gate.as_mut().unwrap().silent_standby = false;
        assert!(lab.run_until(500 * MS, |lab| {
            let joined = lab.joins() == [JoinResult::Joined];
            assert!(joined || lab.guard_census().guarded == 0, "it lacks bytes");
            joined
        }));
        assert!(lab.run_until(SECOND, |lab| lab.is_redundant(1)));
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
        lab.finish();
    }
}

/// What `daytime` says depends on a clock: it cannot be handed over, and its client is told at a takeover.
#[test]
fn what_the_standby_cannot_compute_is_declined_and_reset_at_a_takeover() {
    let mut lab = lab();
    let [daytime, nobody] = [DAYTIME, 12].map(|port| flow_key(CLIENT, 40_000, port));
    for (join, flow) in [(1, daytime), (2, nobody)] {
        let offer = Offer {
            flow,
            join,
            client_isn: 1,
            next: 2,
        };
        lab.flows.process_offer(&offer, lab.now, &mut lab.world);
        let mut records = vec![];
        lab.flows.take_confirmations(|record| records.push(record));
        assert_eq!(records, [Record::Decline { flow, join }]);
    }
    assert_eq!(lab.flows.census().unprotected, 2);
    let report = lab.flows.go_live(lab.now, &mut lab.world);
    assert_eq!(report.resets, [(ResetReason::Unprotected, 2)]);
    assert_eq!(lab.world.resets.len(), 2);
}

#[test]
fn a_connection_that_cannot_be_read_stays_unprotected_is_counted_and_reset() {
    let mut lab = Lab::guarded(5);
    let conn = lab.connect(Plan::echo(200).typed(100, 30 * SECOND), Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got == 100));
    lab.gate.as_mut().unwrap().no_snapshots = true;
    lab.restart_standby();
    lab.run_for(20 * SECOND);
    assert_eq!(lab.joins(), [JoinResult::Failed]);
    assert_eq!(lab.flows.census().unprotected, 1, "though it is idle");
    assert_eq!(lab.guard_census().exposed, 1);
    let report = lab.fail_over(30 * MS);
    assert_eq!(report.resets, [(ResetReason::Unprotected, 1)]);
    lab.settle();
    assert!(
        lab.conns[conn].reset,
        "its client need not find out by itself"
    );
}

#[test]
fn a_standby_without_room_declines_and_takes_what_it_can() {
    let mut lab = Lab::guarded(6);
    for _ in 0..3 {
        lab.connect(Plan::echo(200).typed(100, 30 * SECOND), Tweaks::default());
    }
    lab.run_for(SECOND);
    lab.restart_standby();
    lab.flows.config.max_flows = 2;
    lab.run_for(SECOND);
    let joins = lab.joins();
    let count = |result| joins.iter().filter(|join| **join == result).count();
    assert_eq!(count(JoinResult::Joined), 2);
    assert_eq!(count(JoinResult::Declined), 1);
    let census = lab.flows.census();
    assert_eq!((census.lockstep, census.unprotected), (2, 1));
    assert_eq!(lab.flows.refused(), 1);
    let report = lab.fail_over(30 * MS);
    assert_eq!(report.live, 2);
    assert_eq!(report.resets, [(ResetReason::Unprotected, 1)]);
    lab.settle();
}

#[test]
fn snapshots_survive_the_loss_of_sync_datagrams() {
    for seed in 0..20 {
        let mut lab = Lab::guarded(seed);
        for plan in [
            Plan::echo(2_000_000).typed(2_000, MS),
            Plan::echo(200).typed(100, 60 * SECOND),
            Plan::discard(4_000_000).typed(4_000, MS),
        ] {
            lab.connect(plan, Tweaks::default());
        }
        lab.run_for(100 * MS);
        lab.gate.as_mut().unwrap().sync_loss = 200;
        lab.restart_standby();
        assert!(
            lab.run_until(5 * SECOND, |lab| lab.is_redundant(3)),
            "{:?} {:?}",
            lab.guard_census(),
            lab.flows.census()
        );
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (3, 0), "{report:?}");
        lab.finish();
    }
}

/// Between the snapshot and its arrival an upload would bring more than a standby keeps: its client is told
/// nothing meanwhile.
#[test]
fn an_upload_at_full_speed_joins_late_at_the_first_attempt() {
    for seed in 0..5 {
        let mut lab = Lab::guarded(seed);
        lab.connect(Plan::discard(400_000_000), Tweaks::default());
        lab.run_for(20 * MS);
        lab.gate.as_mut().unwrap().sync_loss = 200;
        lab.restart_standby();
        assert!(lab.run_until(SECOND, |lab| {
            lab.is_redundant(1) && lab.guard_census().joining == 0
        }));
        assert_eq!(lab.joins(), [JoinResult::Joined]);
        assert!(lab.conns[0].sent < 400_000_000, "it was over before");
    }
}

/// Kept frames, snapshot and live copies are in any order, and the connection may end meanwhile.
#[test]
fn every_late_history_ends_exact_once_the_flows_are_guarded() {
    if let Ok(seed) = std::env::var("RFSIS_SEED") {
        history(seed.parse().unwrap());
        return;
    }
    let count = histories::count(HISTORIES);
    let joined: usize = (0..count).map(history).sum();
    assert!(joined > count as usize / 2, "{joined} flows joined");
}

const HISTORIES: u64 = 300;

/// The standby is started anew in the midst of it, perhaps twice; the active dies some steps later. Nobody is
/// reset that was guarded, and nobody gets a wrong byte. Returns how many flows joined.
fn history(seed: u64) -> usize {
    let _named = histories::Named(seed);
    let mut rng = Rng(seed ^ 0x1a7e);
    let mut lab = Lab::guarded(seed);
    guarded::rough_guarded(&mut lab, &mut rng);
    for _ in 0..=rng.below(4) {
        let plan = guarded::any_plan(&mut rng, 18);
        let tweaks = Tweaks {
            client_isn: Some(rng.next() as u32),
            active_isn: Some((rng.below(1 << 18) as u32).wrapping_neg()),
            timestamps: rng.below(2) == 0,
            window_scale: rng.below(2) == 0,
            sack: rng.below(2) == 0,
            client_buffer: 2048 << rng.below(9),
            active_buffer: 4096 << rng.below(7),
        };
        lab.connect(plan, tweaks);
    }
    for _ in 0..=rng.below(2) {
        let at = lab.events + rng.below(600);
        lab.run_until(60 * SECOND, |lab| lab.events >= at);
        lab.restart_standby();
    }
    let latest = [60, 600, 6000][rng.below(3) as usize];
    let crash_at = lab.events + rng.below(latest);
    lab.run_until(60 * SECOND, |lab| lab.events >= crash_at);
    let joins = lab.joins();
    let guard = &lab.gate.as_ref().unwrap().guard;
    let guarded: Vec<bool> = lab
        .conns
        .iter()
        .map(|conn| guard.guards(conn.flow()))
        .collect();
    lab.crash();
    lab.run_for((10 + rng.below(90)) * MS);
    // Nobody has told the new standby of these yet: whoever of them only listens will hear nothing.
    let unheard_of: Vec<bool> = lab
        .conns
        .iter()
        .map(|conn| !lab.flows.flows.contains_key(&conn.flow()))
        .collect();
    let report = lab.take_over();
    let count = lab.conns.len();
    lab.run_until(900 * SECOND, |lab| {
        (0..count).all(|conn| lab.is_done(conn) || lab.conns[conn].reset)
    });
    for (index, (guarded, unheard_of)) in guarded.into_iter().zip(unheard_of).enumerate() {
        let is_done = lab.is_done(index);
        let conn = &lab.conns[index];
        let ends = is_done || (conn.reset && !guarded) || (unheard_of && !guarded);
        assert!(ends, "{conn:?}, guarded: {guarded}, {report:?}");
    }
    lab.clear();
    let joined = |result: &&JoinResult| **result == JoinResult::Joined;
    joins.iter().filter(joined).count()
}

/// A standby to which somebody with the key says what he likes.
struct Hostile {
    lab: Lab,
}

impl Hostile {
    fn new() -> Self {
        Self { lab: Lab::new(1) }
    }

    fn flow(&self, port: u16) -> FlowKey {
        flow_key(CLIENT, port, ECHO)
    }

    fn offer(&mut self, port: u16, join: u32) {
        let offer = Offer {
            flow: self.flow(port),
            join,
            client_isn: 1,
            next: 2,
        };
        let lab = &mut self.lab;
        lab.flows.process_offer(&offer, lab.now, &mut lab.world);
    }

    /// The whole of it, or as far as it goes.
    fn send(&mut self, port: u16, join: u32, total: usize, bytes: &[u8]) {
        let flow = self.flow(port);
        for (index, piece) in bytes.chunks(235).enumerate() {
            let part = Part {
                flow,
                join,
                total: total as u32,
                offset: (index * 235) as u32,
                bytes: piece.into(),
            };
            let lab = &mut self.lab;
            lab.flows.process_part(&part, lab.now, &mut lab.world);
        }
    }

    fn says(&mut self) -> Vec<Record> {
        let mut records = vec![];
        self.lab
            .flows
            .take_confirmations(|record| records.push(record));
        records
    }

    fn frame(&mut self, port: u16, number: u32, payload: &[u8]) {
        let repr = TcpRepr {
            seq_number: seq(number),
            ack_number: Some(seq(1)),
            payload,
            ..bare_repr(port, ECHO, TcpControl::None)
        };
        let packet = by_hand(&repr, Direction::ToVip);
        let lab = &mut self.lab;
        lab.flows
            .process_frame(&packet, Direction::ToVip, lab.now, &mut lab.world);
    }
}

#[test]
fn a_snapshot_that_cannot_be_used_is_declined_and_nothing_of_it_stays() {
    let mut hostile = Hostile::new();
    let garbage = [
        vec![0; 1],
        vec![255; 500],
        vec![0; MAX_SNAPSHOT],
        crate::sync::snapshot::tests::example().to_bytes()[1..].to_vec(),
    ];
    for (join, bytes) in (1..).zip(&garbage) {
        hostile.offer(5, join);
        hostile.send(5, join, bytes.len(), bytes);
        let flow = hostile.flow(5);
        assert!(hostile.says().contains(&Record::Decline { flow, join }));
        assert_eq!(hostile.lab.flows.arrival_bytes, 0);
        assert!(hostile.lab.flows.arrivals.is_empty());
        assert_eq!(hostile.lab.flows.census().unprotected, 1);
    }
    // The same way a good one is taken.
    let bytes = crate::sync::snapshot::tests::example().to_bytes();
    hostile.offer(5, 9);
    hostile.send(5, 9, bytes.len(), &bytes);
    let got = bytes.len() as u32;
    let flow = hostile.flow(5);
    let whole = Record::Got {
        flow,
        join: 9,
        next: got,
    };
    assert!(hostile.says().contains(&whole));
    assert_eq!(hostile.lab.flows.census().unprotected, 0);
    // What comes late neither ends it nor begins it anew.
    hostile.offer(5, 8);
    hostile.offer(5, 9);
    hostile.send(5, 9, bytes.len(), &bytes);
    assert!(hostile.says().contains(&whole));
    assert_eq!(hostile.lab.flows.census().unprotected, 0);
    // Nor if it names the connection by its present number.
    let known = crate::sync::snapshot::tests::example().client_isn();
    for (join, ends) in [(8, 0), (9, 0), (10, 1)] {
        let offer = Offer {
            flow,
            join,
            client_isn: known,
            next: 2,
        };
        let lab = &mut hostile.lab;
        lab.flows.process_offer(&offer, lab.now, &mut lab.world);
        assert_eq!(lab.flows.census().unprotected, ends, "join {join}");
    }
}

#[test]
fn what_is_kept_for_late_joins_is_bounded() {
    let mut hostile = Hostile::new();
    for port in 1..1000 {
        hostile.offer(port, 1);
    }
    let offered = hostile.lab.flows.arrivals.len();
    assert!((100..200).contains(&offered), "{offered} flows");
    // Snapshots that never end.
    for port in 1..1000 {
        hostile.send(port, 1, MAX_SNAPSHOT, &vec![0; MAX_SNAPSHOT - 1]);
        let bytes = hostile.lab.flows.arrival_bytes;
        assert!(bytes <= (64 << 20) + 1000, "{bytes} bytes");
    }
    hostile.lab.run_for(10 * SECOND);
    assert_eq!(hostile.lab.flows.arrival_bytes, 0, "nothing came any more");
    assert!(hostile.lab.flows.arrivals.is_empty());
    // Frames that never end.
    for port in 1..50 {
        hostile.offer(port, 2);
        let before = hostile.lab.flows.arrival_bytes;
        for _ in 0..2_000 {
            hostile.frame(port, 100, &[0; 1400]);
        }
        let bytes = hostile.lab.flows.arrival_bytes;
        assert!(bytes <= 64 << 20, "{bytes} bytes");
        assert!(bytes.saturating_sub(before) <= 2 << 20, "of one flow");
    }
    assert!(hostile.lab.flows.arrivals.len() > 30);
    hostile.lab.run_for(10 * SECOND);
    assert!(hostile.lab.flows.arrivals.is_empty());
    assert_eq!(hostile.lab.flows.arrival_bytes, 0);
}

/// More comes before the snapshot than is kept. One that has the bytes of what was let go is as good as
/// any, one that lacks a single one is of no use.
#[test]
fn frames_are_let_go_if_the_snapshot_has_their_bytes() {
    const PIECE: usize = 1400;
    const FRAMES: usize = 2_500;
    for (lacks, joins) in [(0, true), (1, false)] {
        let mut hostile = Hostile::new();
        hostile.offer(5, 1);
        for index in 0..FRAMES {
            hostile.frame(5, 100 + (index * PIECE) as u32, &[7; PIECE]);
        }
        // Headers of a packet, and what each costs besides.
        let kept = hostile.lab.flows.arrival_bytes / (PIECE + 40 + 64);
        assert!((1_000..FRAMES).contains(&kept));
        let ack = 100 + ((FRAMES - kept) * PIECE) as u32 - lacks;
        let example = crate::sync::snapshot::tests::example();
        let snapshot = Snapshot {
            next: ack,
            ack,
            edge: ack + (1 << 20),
            unacknowledged: 1,
            sent: 1,
            fin: false,
            input: vec![],
            output: vec![],
            ..example
        };
        let bytes = snapshot.to_bytes();
        hostile.send(5, 1, bytes.len(), &bytes);
        let (flow, said) = (hostile.flow(5), hostile.says());
        // So that it is offered again at once.
        let lost = said.contains(&Record::Lost { flow, join: 1 });
        assert_eq!(lost, !joins);
        let held = said.into_iter().find_map(|record| match record {
            Record::Confirm(confirm) => Some(confirm.ack),
            _ => None,
        });
        let all = 100 + (FRAMES * PIECE) as u32;
        assert_eq!(held, joins.then_some(all));
        assert_eq!(hostile.lab.flows.arrival_bytes, 0);
        assert_eq!(hostile.lab.flows.census().unprotected, lacks as usize);
    }
}
