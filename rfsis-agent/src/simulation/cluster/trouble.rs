//! What goes wrong.

use super::*;

impl Cluster {
    pub(super) fn begin(&mut self, index: usize) {
        let (_, trouble) = self.scenario.troubles[index];
        say!(self, "TROUBLE {index}: {trouble}");
        let machine = |who| match who {
            Who::Active => self.active,
            Who::Standby => 1 - self.active,
        };
        let until = self.now + trouble.time();
        if trouble.splits() {
            let Terms { interval, .. } = self.scenario.terms;
            let settles = 4 * interval + self.scenario.terms.takeover_time() * 2;
            self.split_until = self.split_until.max(until + settles);
        }
        match trouble {
            Trouble::Kill { who, .. } => {
                let victim = machine(who);
                self.kill(victim);
                self.at(until, Event::Start(victim));
            }
            Trouble::Reboot { who, .. } => {
                let victim = machine(who);
                self.kill(victim);
                let fallen = &mut self.machines[victim];
                let tweaks = std::mem::take(&mut fallen.kernel.tweaks);
                fallen.kernel = Kernel::new(self.scenario.terms.setup, self.rng.next(), tweaks);
                self.off[victim] = self.off[victim].max(until);
                self.at(until, Event::Start(victim));
            }
            Trouble::Pause { who, steps, .. } => {
                if let Some(agent) = &mut self.machines[machine(who)].agent {
                    agent.stall = Some((steps, until));
                }
            }
            Trouble::Stall { who, .. } => {
                if let Some(agent) = &mut self.machines[machine(who)].agent {
                    agent.engine_stalled = until;
                }
            }
            Trouble::Unplug { who, .. } => {
                let victim = machine(who);
                self.unplugged[victim] = self.unplugged[victim].max(until);
                self.show_carrier(victim, false);
                self.at(until, Event::Plugged(victim));
            }
            Trouble::Cut { .. } | Trouble::Lose { .. } => {
                self.spells.push(Spell { trouble, until });
            }
            Trouble::Switchover => {
                if let Some(agent) = &mut self.machines[self.active].agent {
                    agent.pulse.hand_over = true;
                }
            }
            Trouble::Replay { count } => self.replay(count),
        }
    }

    pub(super) fn show_carrier(&mut self, machine: usize, carrier: bool) {
        if let Some(agent) = &mut self.machines[machine].agent {
            agent.pulse.carrier.push_back(carrier);
        }
    }

    pub(super) fn kill(&mut self, victim: usize) {
        let fallen = &self.machines[victim];
        let Some(agent) = &fallen.agent else {
            return;
        };
        // A standby's words are those of its own last epoch, of which somebody may still be about to hear.
        if !agent.is_standby() {
            let (words, dropped) = (fallen.words(), fallen.connections());
            self.note_end(victim, words, &dropped);
        }
        self.machines[victim].kill(self.now);
        // The epoch is in no file: it lives on in who has heard of it.
        self.heard[victim] = 0;
    }

    pub(super) fn replay(&mut self, count: u64) {
        for _ in 0..count {
            let from = self.rng.below(2) as usize;
            let at = self.rng.below(self.recorded[from].len() as u64) as usize;
            let Some(message) = self.recorded[from].get(at).cloned() else {
                continue;
            };
            self.promises.tally.replayed += 1;
            let event = match message {
                Recorded::Heartbeat(heartbeat) => Event::Heartbeat(1 - from, heartbeat),
                Recorded::Datagram(datagram) => Event::Datagram(1 - from, datagram),
            };
            self.at(self.now + self.rng.clone().below(5 * MS), event);
        }
    }
}
