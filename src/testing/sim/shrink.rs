//! Makes a failing run smaller: fewer lives, pages, shards and kinds of requests, until anything
//! less makes it pass.
//!
//! Invariants
//! 1. Each step is kept only if some run of the smaller plan fails; chance falls differently with a
//!    smaller plan, so a few seeds are tried. It need not be the same failure: a smaller one is
//!    just as welcome.
//! 2. A plan that is written as text and read back is the same plan: what is printed can be
//!    repeated.

use super::plan::{Failure, Plan};
use super::run::run;
use super::workload::{ASKS, Smaller};

/// The number of seeds that are tried with a smaller plan.
const SEEDS: u64 = 12;

impl Plan {
    /// The plan as text, for [`Plan::read`], without its seed, canary, options and profile.
    pub fn describe(&self) -> String {
        let Plan {
            lives,
            images,
            events_max,
            recovery_crash_percent,
            fault_percent,
            damage_percent,
            ..
        } = self;
        let Plan { strain_percent, smaller, .. } = self;
        let (least, most) = (self.shards.start(), self.shards.end());
        let Smaller { pages, in_flight, without } = smaller;
        format!(
            "{lives} {images} {events_max} {recovery_crash_percent} {fault_percent} \
             {damage_percent} {least} {most} {pages} {in_flight} {without} {strain_percent}"
        )
    }

    /// This plan made as small as `text` says, which [`Plan::describe`] has written; `None` if it
    /// is not of that form.
    pub fn read(self, text: &str) -> Option<Plan> {
        let numbers: Vec<u64> =
            text.split_whitespace().map(|word| word.parse().ok()).collect::<Option<_>>()?;
        let &[
            lives,
            images,
            events,
            recovery,
            faults,
            damage,
            least,
            most,
            pages,
            in_flight,
            without,
            strain,
        ] = &numbers[..]
        else {
            return None;
        };
        Some(Plan {
            lives: lives as u32,
            images: images as u32,
            events_max: events,
            recovery_crash_percent: recovery,
            fault_percent: faults,
            damage_percent: damage,
            strain_percent: strain,
            shards: least as u16..=most as u16,
            smaller: Smaller {
                pages: pages as usize,
                in_flight: in_flight as usize,
                without: without as u32,
            },
            ..self
        })
    }

    /// Plans that are a little smaller, the boldest first.
    fn smaller_ones(&self) -> Vec<Plan> {
        let mut plans = Vec::new();
        let mut propose = |plan: Plan| {
            if plan.describe() != self.describe() {
                plans.push(plan);
            }
        };
        let Plan { lives, images, events_max, smaller, .. } = *self;
        let (least, most) = (*self.shards.start(), *self.shards.end());
        propose(Plan {
            recovery_crash_percent: 0,
            fault_percent: 0,
            damage_percent: 0,
            ..self.clone()
        });
        propose(Plan { recovery_crash_percent: 0, ..self.clone() });
        propose(Plan { fault_percent: 0, ..self.clone() });
        propose(Plan { damage_percent: 0, ..self.clone() });
        propose(Plan { strain_percent: 0, strain: None, ..self.clone() });
        propose(Plan { shards: least..=least, ..self.clone() });
        propose(Plan { shards: most..=most, ..self.clone() });
        propose(Plan { shards: least..=(most - 1).max(least), ..self.clone() });
        for lives in [1, lives / 2, lives - 1] {
            propose(Plan { lives: lives.max(1), ..self.clone() });
        }
        for images in [1, images / 2] {
            propose(Plan { images: images.max(1), ..self.clone() });
        }
        for events in [events_max / 8, events_max / 2] {
            propose(Plan { events_max: events.max(8), ..self.clone() });
        }
        let with = |smaller| Plan { smaller, ..self.clone() };
        for pages in [2, 8, smaller.pages / 2] {
            if smaller.pages == 0 || pages < smaller.pages {
                propose(with(Smaller { pages: pages.max(1), ..smaller }));
            }
        }
        for in_flight in [1, 4] {
            if smaller.in_flight == 0 || in_flight < smaller.in_flight {
                propose(with(Smaller { in_flight, ..smaller }));
            }
        }
        for kind in 0..ASKS.len() {
            propose(with(Smaller { without: smaller.without | 1 << kind, ..smaller }));
        }
        plans
    }
}

/// The smallest plan found that fails, and how.
pub fn shrink(plan: &Plan, failure: Failure) -> (Plan, Failure) {
    let (mut plan, mut failure) = (plan.clone(), failure);
    // The failing run did not need what it never reached.
    plan.lives = plan.lives.min(failure.life + 1);
    'smaller: loop {
        for candidate in plan.smaller_ones() {
            for seed in (0..SEEDS).map(|n| failure.seed + n) {
                let candidate = Plan { seed, ..candidate.clone() };
                if let Err(smaller) = run(&candidate) {
                    (plan, failure) = (candidate, smaller);
                    continue 'smaller;
                }
            }
        }
        return (plan, failure);
    }
}
