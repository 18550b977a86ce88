//! Live shadows become kernel sockets, and nobody notices.

use super::hand::Hand;
use super::*;

/// A lab whose kernel adopts.
fn lab() -> Lab {
    let mut lab = super::lab();
    lab.world.adopts = true;
    lab
}

/// Runs `plan` until the client got `got` bytes, kills the active, waits until the kernel has the flow, and
/// goes on to the end. Returns how long that took.
fn is_adopted(plan: Plan, tweaks: Tweaks, got: u64) -> Nanos {
    let mut lab = lab();
    let conn = lab.connect(plan, tweaks);
    assert!(lab.run_until(60 * SECOND, |lab| {
        lab.conns[conn].got.max(lab.conns[conn].sent) >= got
    }));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
    let start = lab.now;
    let adopted = lab.run_until(60 * SECOND, |lab| lab.adoptions() == 1);
    assert!(adopted, "{:?} {:?}", lab.conns, lab.flows.flows);
    let took = lab.now - start;
    let conn = &lab.conns[conn];
    assert!(conn.got < conn.plan.want || conn.sent < conn.plan.upload);
    assert_eq!(lab.world.live.len(), 0);
    assert_eq!(lab.flows.census().live, 0);
    lab.finish();
    took
}

#[test]
fn an_idle_flow_is_adopted_once_its_client_has_been_asked() {
    let plan = Plan::echo(100).typed(10, 10 * SECOND);
    let took = is_adopted(plan, Tweaks::default(), 30);
    assert!(took < 300 * MS, "after {} ms", took / MS);
}

#[test]
fn typed_lines_are_adopted_between_two_of_them() {
    let plan = Plan::echo(20_000).typed(20, MS);
    let took = is_adopted(plan, Tweaks::default(), 500);
    assert!(took < 300 * MS, "after {} ms", took / MS);
}

#[test]
fn bulk_is_adopted_while_its_handler_rests_for_a_moment() {
    for plan in [
        Plan::echo(8_000_000).typed(20_000, MS),
        Plan::chargen(8_000_000).slow(20_000, MS),
        Plan::discard(8_000_000).typed(20_000, MS),
    ] {
        for bits in 0..8 {
            let tweaks = Tweaks {
                timestamps: bits & 1 > 0,
                window_scale: bits & 2 > 0,
                sack: bits & 4 > 0,
                client_buffer: 60_000,
                ..Tweaks::default()
            };
            let took = is_adopted(plan, tweaks, 100_000);
            assert!(took < 400 * MS, "{plan:?} after {} ms", took / MS);
        }
    }
}

/// Its handler must not rest for a client that never reads.
#[test]
fn a_client_that_does_not_read_is_adopted_when_it_does() {
    let mut lab = lab();
    let tweaks = Tweaks {
        client_buffer: 8_000,
        ..Tweaks::default()
    };
    let plan = Plan {
        reads_from: 40 * SECOND,
        ..Plan::chargen(8_000_000).slow(1_000, MS)
    };
    let conn = lab.connect(plan, tweaks);
    lab.run_for(5 * SECOND);
    lab.fail_over(30 * MS);
    lab.run_for(20 * SECOND);
    assert_eq!((lab.adoptions(), lab.conns[conn].got), (0, 0));
    assert!(lab.run_until(120 * SECOND, |lab| lab.adoptions() == 1));
    lab.finish();
}

#[test]
fn what_is_closing_ends_on_its_shadow() {
    let mut lab = lab();
    let plan = Plan::echo(100_000).half_close().slow(500, 10 * MS);
    let conn = lab.connect(plan, Tweaks::default());
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].ended
        && lab.conns[conn].got > 10_000));
    lab.fail_over(30 * MS);
    lab.finish();
    assert_eq!(lab.adoptions(), 0);
}

#[test]
fn a_flow_that_the_kernel_refuses_goes_on_and_is_offered_ever_more_rarely() {
    let mut lab = super::lab();
    let conn = lab.connect(Plan::echo(100_000).typed(100, 10 * MS), Tweaks::default());
    lab.run_for(SECOND);
    lab.fail_over(30 * MS);
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got > 90_000));
    let refusals = lab.world.refusals;
    assert!((3..12).contains(&refusals), "{refusals}");
    lab.finish();
}

/// What the dead active had answered, and the standby has not got, is not settled: the kernel would ignore
/// its acknowledgement for good.
#[test]
fn a_client_that_knows_more_than_the_standby_is_not_adopted_before_it_has_sent_it() {
    let mut lab = Lab::guarded(11);
    lab.world.adopts = true;
    let conn = lab.connect(Plan::echo(4_000_000).typed(2_000, MS), Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 20_000));
    lab.faults.tap_loss = 1000;
    lab.run_for(5 * MS);
    lab.fail_over(30 * MS);
    lab.faults.tap_loss = 0;
    assert!(lab.run_until(10 * SECOND, |lab| lab.adoptions() == 1));
    lab.finish();
}

#[test]
fn many_flows_are_adopted_a_few_at_a_time() {
    let mut lab = lab();
    for _ in 0..100 {
        lab.connect(Plan::echo(100).typed(10, 5 * SECOND), Tweaks::default());
    }
    lab.run_for(2 * SECOND);
    assert_eq!(lab.fail_over(30 * MS).live, 100);
    let mut most = 0;
    let mut before = 0;
    assert!(lab.run_until(SECOND, |lab| {
        most = most.max(lab.adoptions() - before);
        before = lab.adoptions();
        before == 100
    }));
    assert!(most <= 32, "{most} at once");
    lab.finish();
}

#[test]
fn numbers_that_wrap_around_are_adopted() {
    for (client, active) in [(-2000, -90_000), (-150_000, -1), (-1, -2000)] {
        let tweaks = Tweaks {
            client_isn: Some(client as u32),
            active_isn: Some(active as u32),
            ..Tweaks::default()
        };
        is_adopted(Plan::echo(400_000).typed(100, MS), tweaks, 50_000);
    }
}

/// Long conversations on a network that swaps and doubles, most of which are adopted in the middle. `RFSIS_SEED=n` replays one.
#[test]
fn every_history_with_adoptions_ends_exact() {
    let seeds = match std::env::var("RFSIS_SEED") {
        Ok(seed) => {
            let seed = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..histories::count(HISTORIES),
    };
    let count = (seeds.end - seeds.start) as usize;
    let adopted: usize = seeds.map(history).sum();
    assert!(adopted >= count, "{adopted} adopted in {count} histories");
}

const HISTORIES: u64 = 150;

/// How many flows were adopted.
fn history(seed: u64) -> usize {
    let _named = histories::Named(seed);
    let mut rng = Rng(seed ^ 0xa5a5);
    let guarded = seed % 2 == 1;
    let mut lab = match guarded {
        true => Lab::guarded(seed),
        false => Lab::new(seed),
    };
    lab.world.adopts = true;
    lab.faults = Faults {
        loss: 0,
        duplicates: rng.below(20),
        jitter: rng.below(3) * rng.below(MS),
        // Without the ACK gate a lost copy is a lost byte.
        tap_loss: if guarded { rng.below(100) } else { 0 },
        tap_swaps: rng.below(50),
    };
    for _ in 0..3 {
        // Some seconds of talk. The lab's kernel is smoltcp: when a server's window closes, two of them may
        // ignore each other for good. So nothing is lost here, and an echo is slower than any window.
        let echoes = rng.below(2) == 0;
        let (chunk, every) = match echoes {
            true => (1 + rng.below(200), 10 + rng.below(30)),
            false => (1 + rng.below(4000), 1 + rng.below(40)),
        };
        let size = chunk * (2000 + rng.below(4000)) / every;
        let pace = |plan: Plan| match plan.service {
            CHARGEN => plan.slow(chunk as usize, every * MS),
            _ => plan.typed(chunk as usize, every * MS),
        };
        let plan = match rng.below(2) {
            0 if echoes => pace(Plan::echo(size)).half_close(),
            _ if echoes => pace(Plan::echo(size)),
            0 => pace(Plan::chargen(size)),
            _ => pace(Plan::discard(size)),
        };
        let tweaks = Tweaks {
            client_isn: histories::wrapping(&mut rng),
            active_isn: histories::wrapping(&mut rng),
            timestamps: rng.below(2) == 0,
            window_scale: rng.below(2) == 0,
            sack: rng.below(2) == 0,
            client_buffer: 8192 << rng.below(6),
            active_buffer: 16_384 << rng.below(4),
        };
        lab.connect(plan, tweaks);
    }
    lab.run_for((100 + rng.below(900)) * MS);
    let report = lab.fail_over((10 + rng.below(90)) * MS);
    lab.settle();
    for conn in &lab.conns {
        assert!(!conn.reset, "{conn:?} was reset: {report:?}");
    }
    lab.adoptions()
}

/// A flow whose client has said nothing before the takeover, when all of the old active's must have arrived.
fn quiet() -> Hand {
    let mut hand = Hand::open(ECHO);
    hand.world.adopts = true;
    hand.live();
    hand.poll(hand.now);
    hand.now += 300 * MS;
    hand
}

/// An acknowledgement from before all that the old active sent has arrived says too little.
#[test]
fn a_flow_is_adopted_only_after_its_client_was_heard_once_all_has_settled() {
    let mut hand = Hand::open(ECHO);
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.world.adopts = true;
    hand.live();
    hand.client(4, TcpControl::None, b"", Some(4));
    hand.said();
    hand.poll(hand.now);
    hand.now += 300 * MS;
    hand.poll(hand.now);
    hand.poll(hand.now);
    assert_eq!(hand.world.adopted.len(), 0);
    hand.now += MS;
    hand.poll(hand.now);
    assert_eq!(hand.said(), [(3, "", 0, 4)], "the client is asked");
    hand.client(4, TcpControl::None, b"", Some(4));
    hand.now += 100 * MS;
    hand.poll(hand.now);
    let (_, unfinished) = &hand.world.adopted[0];
    assert_eq!(unfinished.input, b"");
}

/// A kernel socket that had promised nothing would drop the first word, for its client to say again.
#[test]
fn a_client_that_has_heard_of_a_window_only_in_the_handshake_is_kept_to_have_been_promised_it() {
    let mut hand = quiet();
    hand.poll(hand.now);
    hand.now += MS;
    hand.poll(hand.now);
    hand.client(1, TcpControl::None, b"", Some(1));
    hand.now += 100 * MS;
    hand.poll(hand.now);
    let (numbers, _) = &hand.world.adopted[0];
    assert!(numbers.rcv_wnd >= 60_000, "{numbers:?}");
}

#[test]
fn what_came_while_the_handler_rested_is_its_input_in_the_kernel() {
    let mut hand = quiet();
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    assert_eq!(hand.said(), [(1, "", 3, 4)]);
    hand.poll(hand.now);
    assert_eq!(hand.world.adopted.len(), 0, "the handler rests");
    hand.client(4, TcpControl::Psh, b"def", Some(4));
    hand.poll(hand.now);
    assert_eq!(hand.world.adopted[0].1.input, b"def");
}

#[test]
fn a_handler_does_not_rest_for_a_client_that_acknowledges_nothing() {
    let mut hand = quiet();
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.poll(hand.now);
    hand.said();
    hand.client(4, TcpControl::Psh, b"def", Some(1));
    let said = |hand: &mut Hand| {
        let said = hand.said();
        said.iter()
            .any(|(seq, _, len, _)| *len > 0 && *seq as usize + *len > 4)
    };
    assert!(!said(&mut hand), "it rests");
    hand.now += 110 * MS;
    hand.poll(hand.now);
    assert!(said(&mut hand), "it goes on");
}
