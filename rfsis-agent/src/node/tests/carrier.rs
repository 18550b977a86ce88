//! A cable that is pulled, and plugged in again.

use super::*;

#[test]
fn a_standby_without_carrier_takes_over_from_nobody_and_afterwards_gives_the_peer_time() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.hear(State::Active, 2);
    bench.feed(Event::Carrier(false));
    let actions = bench.run(1_000 * MS);
    assert_eq!(
        (bench.node.state(), opened(&actions)),
        (State::Standby, None)
    );
    bench.feed(Event::Carrier(true));
    assert_eq!(bench.node.peer_lived_until(), Some(1_000 * MS));
    assert_eq!(opened(&bench.run(1_029 * MS)), None);
    assert!(opened(&bench.run(1_030 * MS)).is_some());
}

/// A standby that takes over from one that has started anew would else believe that it was deaf meanwhile.
#[test]
fn who_says_standby_again_and_again_was_active_until_the_first_time() {
    let mut bench = Bench::new(Role::Backup);
    let mut hear = |at: Nanos, state| {
        bench.run(at * MS);
        bench.hear(state, 2);
        bench.node.peer_lived_until().map(|until| until / MS)
    };
    assert_eq!(hear(20, State::Active), Some(20));
    assert_eq!(hear(30, State::Standby), Some(30));
    assert_eq!(hear(35, State::Standby), Some(30));
    assert_eq!(hear(40, State::Fenced), Some(40));
    assert_eq!(hear(45, State::Fenced), Some(45));
}

#[test]
fn what_came_before_a_cut_is_no_sign_of_life_after_it() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.hear(State::Active, 2);
    bench.now = 100 * MS;
    // It slept through all of that.
    bench.feed(Event::Carrier(false));
    bench.feed(Event::Carrier(true));
    for state in [State::Active, State::HandingOver] {
        bench.heartbeat.sequence += 1;
        bench.heartbeat.state = state;
        let heartbeat = bench.heartbeat;
        let arrival = 30 * MS;
        bench.feed(Event::Heartbeat { heartbeat, arrival });
        assert_eq!(opened(&bench.feed(Event::Tick)), None, "{state:?}");
    }
    assert_eq!(opened(&bench.run(129 * MS)), None);
    assert!(opened(&bench.run(130 * MS)).is_some());
}

#[test]
fn an_active_without_carrier_earns_no_lease_and_claims_nothing() {
    let mut bench = Bench::active();
    bench.hear(State::Standby, 3);
    bench.feed(Event::Carrier(false));
    let actions = bench.run(1_000 * MS);
    let renewed = |a: &Action| matches!(a, Action::RenewLease { .. });
    assert!(!actions.iter().any(renewed));
    assert_eq!(opened(&actions), None);
    assert_eq!((bench.node.state(), bench.node.epoch()), (State::Fenced, 3));
}

#[test]
fn a_cut_shorter_than_the_lease_changes_nothing() {
    let mut bench = Bench::active();
    bench.hear(State::Standby, 3);
    bench.feed(Event::Carrier(false));
    bench.run(bench.now + 10 * MS);
    let actions = bench.feed(Event::Carrier(true));
    assert_eq!(count(&actions, Action::Announce), 1);
    assert_eq!(bench.node.state(), State::Active);
}

#[test]
fn an_active_that_was_cut_off_goes_on_only_when_its_standby_says_that_it_still_is_one() {
    let back = |state: State, epoch: u64, restarted: bool| {
        let mut bench = Bench::active();
        bench.hear(State::Standby, 3);
        bench.feed(Event::Carrier(false));
        bench.run(1_000 * MS);
        bench.feed(Event::Carrier(true));
        if restarted {
            bench.heartbeat.session += 1;
        }
        bench.now += MS;
        bench.hear(state, epoch);
        (bench.node.state(), bench.node.epoch())
    };
    assert_eq!(back(State::Standby, 3, false), (State::Active, 3));
    assert_eq!(back(State::Active, 4, false), (State::Standby, 4));
    assert_eq!(back(State::Standby, 4, false), (State::Standby, 4));
    assert_eq!(back(State::Standby, 3, true), (State::Standby, 3));
}

#[test]
fn an_active_that_was_cut_off_and_finds_nobody_claims_the_vip_again() {
    let mut bench = Bench::active();
    bench.hear(State::Standby, 3);
    bench.feed(Event::Carrier(false));
    bench.run(1_000 * MS);
    bench.feed(Event::Carrier(true));
    assert_eq!(opened(&bench.run(1_029 * MS)), None);
    assert!(opened(&bench.run(1_070 * MS)).is_some());
    assert_eq!(bench.node.epoch(), 4);
}

#[test]
fn an_active_that_slept_goes_on_though_the_agent_of_its_standby_was_started_anew_meanwhile() {
    let mut bench = Bench::active();
    bench.hear(State::Standby, 3);
    bench.now = 90 * MS;
    bench.hear(State::Standby, 3);
    assert_eq!(bench.node.state(), State::Fenced);
    bench.heartbeat.session += 1;
    bench.now += MS;
    bench.hear(State::Standby, 0);
    assert_eq!((bench.node.state(), bench.node.epoch()), (State::Active, 3));
}
