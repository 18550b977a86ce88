//! One node, driven by hand.

mod carrier;

use std::net::Ipv4Addr;

use super::*;
use crate::cli::Role;
use crate::heartbeat::session::Refusal;
use crate::heartbeat::{Echo, MacAddr};

const MS: Nanos = 1_000_000;
const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const OWN_SESSION: u64 = 11;
const PEER_MAC: MacAddr = [2, 0, 0, 0, 0, 2];

/// A node, its peer's next heartbeat, and the time.
struct Bench {
    node: Node,
    now: Nanos,
    heartbeat: Heartbeat,
}

impl Bench {
    /// 10 ms × 3, lease 25 ms, grace 500 ms; the peer has the other role.
    fn new(role: Role) -> Self {
        let peer_role = match role {
            Role::Primary => Role::Backup,
            Role::Backup => Role::Primary,
        };
        let config = NodeConfig {
            role,
            node: OWN,
            peer: PEER,
            mac: [2, 0, 0, 0, 0, 1],
            tap_mac: [2, 0, 0, 0, 0, 1],
            interval: Duration::from_millis(10),
            missed: 3,
            lease: Duration::from_millis(25),
            startup_grace: Duration::from_millis(500),
            session: OWN_SESSION,
        };
        Self {
            node: Node::new(config, 0),
            now: 0,
            heartbeat: Heartbeat {
                state: State::Standby,
                role: peer_role,
                node: PEER,
                mac: PEER_MAC,
                tap_mac: PEER_MAC,
                epoch: 0,
                session: 22,
                sequence: 0,
                sent_ns: 0,
                echo: None,
                wish: Wish::None,
                objection: None,
                at_risk: 0,
            },
        }
    }

    /// Feeds an event, and reports what is sent as sent; all actions.
    fn feed(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.node.handle(event, self.now, &mut actions);
        let sent: Vec<_> = actions.iter().filter_map(heartbeat_of).collect();
        for heartbeat in sent {
            let sequence = heartbeat.sequence;
            let event = Event::HeartbeatSent { sequence };
            self.node.handle(event, self.now, &mut actions);
        }
        actions
    }

    /// Ticks whenever the node asks for it, up to `until`.
    fn run(&mut self, until: Nanos) -> Vec<Action> {
        let mut actions = Vec::new();
        while self.node.next_wakeup() <= until {
            self.now = self.node.next_wakeup().max(self.now);
            actions.extend(self.feed(Event::Tick));
            assert!(self.node.next_wakeup() > self.now, "a busy loop");
        }
        self.now = until;
        actions
    }

    /// The peer's next heartbeat arrives; it echoes our last.
    fn hear(&mut self, state: State, epoch: u64) -> Vec<Action> {
        self.heartbeat.sequence += 1;
        self.heartbeat.state = state;
        self.heartbeat.epoch = epoch;
        self.heartbeat.echo = Some(Echo {
            session: OWN_SESSION,
            sequence: self.node.session.own_sequence(),
        });
        self.hear_again()
    }

    fn hear_again(&mut self) -> Vec<Action> {
        self.feed(Event::Heartbeat {
            heartbeat: self.heartbeat,
            arrival: self.now,
        })
    }

    /// Active with epoch 3 after its peer, active with epoch 2, died.
    fn active() -> Self {
        let mut bench = Self::new(Role::Backup);
        bench.run(20 * MS);
        bench.hear(State::Active, 2);
        bench.run(60 * MS);
        bench.feed(Event::TakeoverDone);
        assert_eq!((bench.node.state(), bench.node.epoch()), (State::Active, 3));
        bench
    }
}

fn heartbeat_of(action: &Action) -> Option<Heartbeat> {
    match action {
        Action::SendHeartbeat { heartbeat, .. } => Some(*heartbeat),
        _ => None,
    }
}

fn opened(actions: &[Action]) -> Option<Action> {
    let open = |a: &&Action| {
        matches!(
            a,
            Action::SetState {
                state: State::Active,
                ..
            }
        )
    };
    actions.iter().find(open).copied()
}

fn count(actions: &[Action], wanted: Action) -> usize {
    actions.iter().filter(|a| **a == wanted).count()
}

fn report(actions: &[Action], wanted: impl Fn(&Fact) -> bool) -> usize {
    let is = |a: &&Action| matches!(a, Action::Report(fact) if wanted(fact));
    actions.iter().filter(is).count()
}

#[test]
fn a_standby_takes_over_when_the_active_is_silent_and_not_before() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.hear(State::Active, 7);
    assert_eq!(opened(&bench.run(50 * MS - 1)), None);
    let actions = bench.run(50 * MS);
    assert_eq!(
        opened(&actions),
        Some(Action::SetState {
            state: State::Active,
            epoch: 8,
            lease_until: 75 * MS
        })
    );
    let take_over = Action::TakeOver {
        reason: TakeoverReason::HeartbeatTimeout,
        epoch: 8,
        peer_silent_for: Some(Duration::from_millis(30)),
    };
    assert_eq!(count(&actions, take_over), 1);
    assert_eq!(count(&actions, Action::Announce), 1);
    assert_eq!(bench.node.state(), State::TakingOver);
    bench.feed(Event::TakeoverDone);
    assert_eq!(bench.node.state(), State::Active);
}

#[test]
fn replayed_heartbeats_extend_no_deadline() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.hear(State::Active, 7);
    let refused = Action::Count(HeartbeatResult::Refused(Refusal::Stale));
    let mut actions = Vec::new();
    for at in 20..50 {
        actions.extend(bench.run(at * MS));
        assert_eq!(bench.hear_again(), [refused]);
    }
    assert_eq!(opened(&actions), None);
    assert!(opened(&bench.run(50 * MS)).is_some());
}

/// The kernel's arrival time counts, not the time at which a late agent looks.
#[test]
fn a_heartbeat_seen_late_counts_from_its_arrival() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.hear(State::Active, 1);
    bench.now = 200 * MS;
    bench.heartbeat.sequence += 1;
    let (heartbeat, arrival) = (bench.heartbeat, 195 * MS);
    bench.feed(Event::Heartbeat { heartbeat, arrival });
    assert_eq!(opened(&bench.run(225 * MS - 1)), None);
    assert!(opened(&bench.run(225 * MS)).is_some());
}

#[test]
fn alone_a_primary_starts_soon_and_a_backup_after_its_grace() {
    for (role, wait) in [(Role::Primary, 200 * MS), (Role::Backup, 500 * MS)] {
        let mut bench = Bench::new(role);
        // The claim: a lease holds in its last nanosecond too.
        assert_eq!(opened(&bench.run(wait + 25 * MS)), None);
        let actions = bench.run(wait + 25 * MS + 1);
        assert!(opened(&actions).is_some(), "{role:?}");
        let take_over = Action::TakeOver {
            reason: TakeoverReason::Startup,
            epoch: 1,
            peer_silent_for: None,
        };
        assert_eq!(count(&actions, take_over), 1);
    }
}

#[test]
fn a_primary_that_starts_beside_an_active_peer_stays_standby() {
    let mut bench = Bench::new(Role::Primary);
    let mut actions = Vec::new();
    for at in (5..2_000).step_by(10) {
        actions.extend(bench.run(at * MS));
        actions.extend(bench.hear(State::Active, 4));
    }
    assert_eq!(opened(&actions), None);
    assert_eq!(
        (bench.node.state(), bench.node.epoch()),
        (State::Standby, 4)
    );
}

#[test]
fn a_primary_beside_a_fresh_standby_claims_at_once() {
    let mut bench = Bench::new(Role::Primary);
    bench.run(MS);
    bench.hear(State::Standby, 0);
    assert!(opened(&bench.run(26 * MS + 1)).is_some());
}

/// The peer may be about to take over, and it has the shadows.
#[test]
fn a_restarted_primary_leaves_the_takeover_to_a_standby_that_knows_an_epoch() {
    let mut bench = Bench::new(Role::Primary);
    let mut actions = bench.run(MS);
    for at in (5..195).step_by(10) {
        actions.extend(bench.run(at * MS));
        actions.extend(bench.hear(State::Standby, 4));
    }
    assert_eq!(report(&actions, |f| matches!(f, Fact::Claiming(..))), 0);
    actions.extend(bench.run(200 * MS));
    assert_eq!(report(&actions, |f| matches!(f, Fact::Claiming(..))), 1);
}

#[test]
fn replays_of_unproven_sessions_cannot_keep_the_vip_dead() {
    let mut bench = Bench::new(Role::Backup);
    let mut actions = Vec::new();
    for at in 1..1_100 {
        actions.extend(bench.run(at * MS));
        bench.heartbeat.sequence += 1;
        bench.heartbeat.echo = None;
        bench.hear_again();
    }
    assert!(opened(&actions).is_some());
}

#[test]
fn of_two_active_nodes_the_lower_epoch_yields_then_who_claims_then_the_lower_address() {
    for (state, epoch, yields) in [
        (State::Active, 2, false),
        (State::Active, 3, true),
        (State::Active, 4, true),
        (State::TakingOver, 3, false),
        (State::TakingOver, 4, true),
    ] {
        let mut bench = Bench::active();
        let actions = bench.hear(state, epoch);
        let reason = YieldReason::Outranked;
        assert_eq!(
            count(&actions, Action::Yield { reason }),
            usize::from(yields)
        );
        let closed = |a: &Action| {
            matches!(
                a,
                Action::SetState {
                    state: State::Standby,
                    ..
                }
            )
        };
        assert_eq!(actions.iter().any(closed), yields);
        assert_eq!(
            bench.node.state() == State::Standby,
            yields,
            "{state:?}, epoch {epoch}"
        );
    }
}

#[test]
fn the_winner_announces_when_the_episode_begins_and_when_it_ends() {
    let mut bench = Bench::active();
    let mut actions = Vec::new();
    for _ in 0..10 {
        actions.extend(bench.hear(State::Active, 2));
    }
    assert_eq!(count(&actions, Action::Announce), 1);
    let mut actions = bench.hear(State::Standby, 3);
    actions.extend(bench.hear(State::Standby, 3));
    assert_eq!(count(&actions, Action::Announce), 1);
}

#[test]
fn the_lease_follows_what_was_sent_and_lapses_when_nothing_can_be() {
    let mut bench = Bench::active();
    let actions = bench.run(70 * MS);
    assert_eq!(count(&actions, Action::RenewLease { until: 95 * MS }), 1);
    let mut closed = Vec::new();
    while closed.is_empty() {
        bench.now = bench.node.next_wakeup();
        bench.node.handle(Event::Tick, bench.now, &mut closed);
        let renewed = |a: &Action| matches!(a, Action::RenewLease { .. });
        assert!(!closed.iter().any(renewed));
        closed.retain(|a| {
            matches!(
                a,
                Action::SetState {
                    state: State::Fenced,
                    ..
                }
            )
        });
        let mut actions = Vec::new();
        bench
            .node
            .handle(Event::LinkSendFailed, bench.now, &mut actions);
    }
    assert_eq!(bench.now, 100 * MS);
}

#[test]
fn a_fenced_node_resumes_only_on_an_answer_to_what_it_sent_after_fencing() {
    let fenced = |echo_back: u64, answer_after: Nanos, state: State| {
        let mut bench = Bench::active();
        bench.hear(State::Standby, 3);
        bench.now = 90 * MS;
        bench.hear(State::Standby, 3);
        assert_eq!(bench.node.state(), State::Fenced);
        bench.now += answer_after;
        bench.heartbeat.sequence += 1;
        bench.heartbeat.state = state;
        bench.heartbeat.echo = Some(Echo {
            session: OWN_SESSION,
            sequence: bench.node.session.own_sequence() - echo_back,
        });
        bench.hear_again();
        bench.node.state()
    };
    // The answer that came with the fencing itself is not one: see `hear`'s echo.
    assert_eq!(fenced(0, MS, State::Standby), State::Active);
    assert_eq!(fenced(1, MS, State::Standby), State::Fenced);
    assert_eq!(fenced(0, 25 * MS, State::Standby), State::Fenced);
    assert_eq!(fenced(0, MS, State::Active), State::Standby);
}

#[test]
fn heartbeats_go_to_the_peer_alone_while_it_is_heard_and_to_all_otherwise() {
    let to = |actions: &[Action]| {
        actions.iter().rev().find_map(|a| match a {
            Action::SendHeartbeat { to, .. } => Some(*to),
            _ => None,
        })
    };
    let mut bench = Bench::new(Role::Backup);
    assert_eq!(to(&bench.run(5 * MS)), Some(None));
    bench.hear(State::Active, 1);
    assert_eq!(to(&bench.run(10 * MS)), Some(Some(PEER_MAC)));
    assert!(bench.node.peer_heard(bench.now));
    assert_eq!(to(&bench.run(50 * MS)), Some(None));
    assert!(!bench.node.peer_heard(bench.now));
}

#[test]
fn another_host_with_our_address_is_reported_once_in_a_while_and_changes_nothing() {
    let mut bench = Bench::active();
    bench.heartbeat.node = OWN;
    let mut actions = Vec::new();
    for _ in 0..1_000 {
        actions.extend(bench.hear(State::Active, 99));
    }
    assert_eq!(report(&actions, |f| matches!(f, Fact::Misconfigured(_))), 1);
    assert_eq!((bench.node.state(), bench.node.epoch()), (State::Active, 3));
}

#[test]
fn a_stopped_node_closes_the_gate_and_is_silent() {
    let mut bench = Bench::active();
    let actions = bench.feed(Event::Stop);
    assert!(matches!(
        actions[0],
        Action::SetState {
            state: State::Standby,
            lease_until: 0,
            ..
        }
    ));
    assert_eq!(bench.node.next_wakeup(), Nanos::MAX);
    bench.now += 1_000 * MS;
    assert_eq!(bench.feed(Event::Tick), []);
}

#[test]
fn at_most_one_heartbeat_is_sent_per_interval_after_a_stall() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.now = 300 * MS;
    let sent = |actions: &[Action]| actions.iter().filter_map(heartbeat_of).count();
    assert_eq!(sent(&bench.feed(Event::Tick)), 1);
    assert_eq!(sent(&bench.run(309 * MS)), 0);
    assert_eq!(sent(&bench.run(310 * MS)), 1);
}

/// Both may have a deadline: two that yielded to each other must not open at once.
#[test]
fn a_standby_whose_peer_said_standby_or_has_a_new_agent_claims_before_it_opens() {
    for proven in [true, false] {
        let mut bench = Bench::new(Role::Backup);
        bench.run(20 * MS);
        bench.hear(State::Active, 7);
        bench.run(25 * MS);
        if proven {
            bench.hear(State::Standby, 7);
        } else {
            (bench.heartbeat.session, bench.heartbeat.echo) = (33, None);
            bench.hear_again();
        }
        let mut actions = bench.run(75 * MS);
        assert_eq!(opened(&actions), None);
        assert_eq!(bench.node.state(), State::TakingOver);
        actions.extend(bench.run(75 * MS + 1));
        assert!(opened(&actions).is_some());
    }
}

/// It may be renewing its lease in the belief to be alone.
#[test]
fn a_claim_waits_for_the_lease_of_an_outranked_peer_that_still_speaks() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(500 * MS);
    assert_eq!(bench.node.state(), State::TakingOver);
    bench.run(515 * MS);
    bench.hear(State::Active, 0);
    assert_eq!(opened(&bench.run(540 * MS)), None);
    assert!(opened(&bench.run(540 * MS + 1)).is_some());
}

fn sent(actions: &[Action]) -> Vec<Heartbeat> {
    actions.iter().filter_map(heartbeat_of).collect()
}

#[test]
fn a_handover_closes_the_gate_before_it_is_offered_and_ends_with_the_higher_epoch() {
    let mut bench = Bench::active();
    bench.hear(State::Standby, 3);
    let actions = bench.feed(Event::HandOver);
    let closed = actions.iter().position(|a| {
        matches!(
            a,
            Action::SetState {
                state: State::HandingOver,
                ..
            }
        )
    });
    let offered = actions.iter().position(|a| heartbeat_of(a).is_some());
    assert!(closed < offered && closed.is_some(), "{actions:?}");
    let offer = sent(&actions)[0];
    assert_eq!((offer.state, offer.epoch), (State::HandingOver, 3));
    // What it said before may still be under way.
    bench.hear(State::Standby, 3);
    assert_eq!(bench.node.state(), State::HandingOver);
    let actions = bench.hear(State::TakingOver, 4);
    let reason = YieldReason::HandedOver;
    assert_eq!(count(&actions, Action::Yield { reason }), 1);
    assert_eq!(bench.node.state(), State::Standby);
}

#[test]
fn nothing_is_handed_over_by_a_standby_or_to_nobody() {
    let refused = |bench: &mut Bench| {
        let actions = bench.feed(Event::HandOver);
        assert_eq!(sent(&actions), []);
        match actions[..] {
            [Action::Report(Fact::NotHandedOver(objection))] => objection,
            _ => panic!("{actions:?}"),
        }
    };
    let mut standby = Bench::new(Role::Backup);
    standby.run(20 * MS);
    standby.hear(State::Active, 7);
    assert_eq!(refused(&mut standby), Objection::NotActive);
    let mut active = Bench::active();
    // Its last word was that it is active, and it died.
    assert_eq!(refused(&mut active), Objection::NoStandby);
    active.hear(State::Standby, 3);
    active.run(active.now + 30 * MS);
    assert_eq!(refused(&mut active), Objection::NoStandby);
}

#[test]
fn an_offer_is_taken_by_the_tick_behind_it_unless_something_newer_was_heard() {
    for taken_back in [false, true] {
        let mut bench = Bench::new(Role::Backup);
        bench.run(20 * MS);
        bench.hear(State::Active, 7);
        assert_eq!(opened(&bench.hear(State::HandingOver, 7)), None);
        if taken_back {
            bench.hear(State::TakingOver, 7);
        }
        let actions = bench.feed(Event::Tick);
        assert_eq!(opened(&actions).is_some(), !taken_back);
        if !taken_back {
            let take_over = Action::TakeOver {
                reason: TakeoverReason::Switchover,
                epoch: 8,
                peer_silent_for: Some(Duration::ZERO),
            };
            assert_eq!(count(&actions, take_over), 1);
        }
    }
}

/// Its new agent may be active, although the offer of the old one was the last thing heard.
#[test]
fn an_offer_is_claimed_first_where_the_peer_may_have_a_new_agent() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.hear(State::Active, 7);
    bench.hear(State::HandingOver, 7);
    bench.now += MS;
    (bench.heartbeat.session, bench.heartbeat.echo) = (33, None);
    bench.hear_again();
    assert_eq!(opened(&bench.feed(Event::Tick)), None);
    assert_eq!(bench.node.state(), State::TakingOver);
}

#[test]
fn a_wish_is_said_until_it_is_refused_and_an_old_refusal_does_not_count() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.hear(State::Active, 7);
    let wish = |bench: &mut Bench| sent(&bench.run(bench.now + 10 * MS))[0].wish;
    assert_eq!(wish(&mut bench), Wish::None);
    // An answer to an earlier wish, still under way.
    bench.heartbeat.objection = Some(Objection::Degraded);
    bench.hear(State::Active, 7);
    let said = sent(&bench.feed(Event::Wish(Wish::Insists)));
    assert_eq!(said[0].wish, Wish::Insists, "at once");
    bench.heartbeat.sequence += 1;
    assert_eq!(
        report(&bench.hear_again(), |f| matches!(f, Fact::Refused { .. })),
        0
    );
    assert_eq!(wish(&mut bench), Wish::Insists);
    (bench.heartbeat.objection, bench.heartbeat.at_risk) = (Some(Objection::AtRisk), 4);
    let refused = Fact::Refused {
        objection: Objection::AtRisk,
        flows: 4,
    };
    assert_eq!(report(&bench.hear(State::Active, 7), |f| *f == refused), 1);
    assert_eq!(wish(&mut bench), Wish::None);
}

#[test]
fn a_wish_is_heard_once_and_answered_as_long_as_it_lasts() {
    let mut bench = Bench::active();
    let wished = |actions: &[Action], wish| count(actions, Action::Wished(wish));
    bench.heartbeat.wish = Wish::Asks;
    assert_eq!(wished(&bench.hear(State::Standby, 3), Wish::Asks), 1);
    assert_eq!(wished(&bench.hear(State::Standby, 3), Wish::Asks), 0);
    let objection = |actions: &[Action]| sent(actions)[0].objection;
    let answer = bench.feed(Event::Object(Objection::AtRisk));
    assert_eq!(objection(&answer), Some(Objection::AtRisk));
    let again = bench.run(bench.now + 10 * MS);
    assert_eq!(objection(&again), Some(Objection::AtRisk));
    // It insists: that is another wish.
    bench.heartbeat.wish = Wish::Insists;
    assert_eq!(wished(&bench.hear(State::Standby, 3), Wish::Insists), 1);
    assert_eq!(objection(&bench.run(bench.now + 10 * MS)), None);
    bench.feed(Event::Object(Objection::Unanswered));
    bench.heartbeat.wish = Wish::None;
    bench.hear(State::Standby, 3);
    assert_eq!(objection(&bench.run(bench.now + 10 * MS)), None);
    assert_eq!(
        bench.feed(Event::Object(Objection::AtRisk)),
        [],
        "nobody asks"
    );
}

#[test]
fn a_node_that_is_not_active_objects_by_itself_and_all_say_what_is_at_risk() {
    let mut bench = Bench::new(Role::Backup);
    bench.run(20 * MS);
    bench.feed(Event::AtRisk(9));
    bench.heartbeat.wish = Wish::Asks;
    let actions = bench.hear(State::Standby, 3);
    assert_eq!(count(&actions, Action::Wished(Wish::Asks)), 0);
    let said = sent(&bench.run(bench.now + 10 * MS))[0];
    assert_eq!(
        (said.objection, said.at_risk),
        (Some(Objection::NotActive), 9)
    );
}

/// Such a standby has forgotten the connections that it followed.
#[test]
fn an_active_goes_on_to_the_next_epoch_when_its_standby_has_tried_to_take_over() {
    for (heard, epoch) in [
        (&[(State::Standby, 3)][..], 3),
        (&[(State::Standby, 2)], 3),
        // Before it had heard of the active.
        (&[(State::Fenced, 2), (State::Standby, 3)], 3),
        (&[(State::Fenced, 3), (State::Standby, 3)], 4),
        // Its one heartbeat of that was lost.
        (&[(State::Standby, 5)], 6),
        (
            &[
                (State::Standby, 5),
                (State::Standby, 5),
                (State::Standby, 6),
            ],
            6,
        ),
    ] {
        let mut bench = Bench::active();
        for (state, epoch) in heard {
            bench.hear(*state, *epoch);
        }
        assert_eq!(bench.node.state(), State::Active);
        assert_eq!(bench.node.epoch(), epoch, "{heard:?}");
    }
}

#[test]
fn what_decides_about_the_vip_is_not_said_a_lease_late() {
    let mut bench = Bench::active();
    let mut heartbeat = sent(&bench.run(bench.now + 100 * MS))[0];
    let lapses = heartbeat.sent_ns + bench.node.lease;
    for (state, decides) in [
        (State::Active, true),
        (State::TakingOver, true),
        (State::HandingOver, true),
        (State::Standby, false),
        (State::Fenced, false),
    ] {
        heartbeat.state = state;
        assert!(!bench.node.is_stale(&heartbeat, lapses), "{state:?}");
        assert_eq!(
            bench.node.is_stale(&heartbeat, lapses + 1),
            decides,
            "{state:?}"
        );
    }
}
