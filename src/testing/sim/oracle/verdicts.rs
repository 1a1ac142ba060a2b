//! Decides whether the store may give an answer, or have a state after a crash.

use super::pending_requests::{Kind, PendingRequest};
use super::{Oracle, Tolerance, Verdict, difference};
use crate::base::error::{Error, ErrorKind};
use crate::base::{Lsn, PageKey};
use crate::engine::{Commit, PageRef, Response, Token};

impl Oracle {
    pub(super) fn judge(&mut self, pending: &PendingRequest, response: &Response) -> Verdict {
        match (&pending.what, response) {
            (Kind::Read(keys), Response::Pages(pages)) => {
                if keys.len() != pages.len() {
                    return Err(format!("{} pages for {} keys", pages.len(), keys.len()));
                }
                let all = keys.iter().zip(pages);
                all.into_iter().try_for_each(|(&(key, oldest), page)| {
                    self.judge_page(key, page, oldest, pending.seen)
                })
            }
            (Kind::Commit(commit), Response::Committed(lsn)) if commit.changes.is_empty() => {
                self.judge_reader(pending, commit, *lsn)
            }
            (Kind::Commit(commit), Response::Committed(lsn)) => {
                if pending.allocated != Some(*lsn) {
                    return Err(format!(
                        "acknowledged as {lsn:?}, allocated {:?}",
                        pending.allocated
                    ));
                }
                self.ordered = self.ordered.max(*lsn);
                self.visibility.acknowledged(*lsn);
                if commit.durable {
                    self.counters.commits_durable += 1;
                    self.promise(*lsn, "the answer to a durable commit");
                } else {
                    self.counters.commits_buffered += 1;
                }
                Ok(())
            }
            (Kind::Flush, Response::Flushed(lsn)) if *lsn < pending.ordered => Err(format!(
                "flushed up to {lsn:?}, although {:?} had been acknowledged before",
                pending.ordered
            )),
            (Kind::Flush, Response::Flushed(lsn))
            | (Kind::Checkpoint, Response::Checkpointed(lsn)) => self.says_durable(*lsn),
            (Kind::WaitDurable(lsn), Response::Durable) => self.says_durable(*lsn),
            (Kind::Stats, Response::Stats(stats)) => self.says_durable(Lsn::new(stats.durable_lsn)),
            (Kind::Close, Response::Closed) => {
                self.closed = true;
                self.says_durable(self.last)
            }
            (_, other) => Err(format!("answered with {other:?}")),
        }
    }

    /// Called when an answer says that everything up to `lsn` is durable.
    pub(super) fn says_durable(&mut self, lsn: Lsn) -> Verdict {
        self.counters.others += 1;
        self.promise(lsn, "an answer to a flush, a wait, a checkpoint, counters or a close");
        Ok(())
    }

    /// Called when an answer said that everything up to `lsn` is durable. The last commit up to
    /// there counts: an epoch begins far above the last one.
    pub(super) fn promise(&mut self, lsn: Lsn, who: &'static str) {
        let commits = self.allocated.partition_point(|&(allocated, _)| allocated <= lsn);
        let Some(&(lsn, _)) = commits.checked_sub(1).and_then(|last| self.allocated.get(last))
        else {
            return;
        };
        if lsn > self.durable {
            (self.durable, self.promise) = (lsn, who);
        }
    }

    pub(super) fn judge_reader(
        &mut self,
        pending: &PendingRequest,
        commit: &Commit,
        lsn: Lsn,
    ) -> Verdict {
        // That a page was freed counts as read too; for an earlier life that is not known here.
        let told = commit.reads.iter().map(|&(_, read)| read).max().unwrap_or(Lsn::ZERO);
        let newest = commit.reads.iter().map(|&(key, _)| self.model.at(key, self.last).lsn).max();
        if lsn < told || lsn > newest.unwrap_or(Lsn::ZERO).max(told).max(self.began) {
            return Err(format!(
                "answered with {lsn:?}; it was told {told:?}, the newest is {newest:?}"
            ));
        }
        let all = commit.reads.iter().flat_map(|&(key, _)| self.model.since(key, pending.seen));
        let mut moments: Vec<Lsn> = all.map(|version| version.lsn.max(pending.seen)).collect();
        moments.push(pending.seen);
        let right = |&moment: &Lsn| {
            commit.reads.iter().all(|&(key, read)| self.model.at(key, moment).told() == read)
        };
        if !moments.iter().any(right) {
            return Err(format!(
                "its reads {:?} were never all current while it was under way",
                commit.reads
            ));
        }
        self.counters.commits_reading += 1;
        if commit.durable {
            self.promise(lsn, "the answer to a reader");
        }
        Ok(())
    }

    /// Checks that a request may read this version of a page, if the version of `oldest` was the
    /// oldest possible one, and `seen` the newest LSN.
    pub(super) fn judge_page(
        &mut self,
        key: PageKey,
        page: &PageRef,
        oldest: Lsn,
        seen: Lsn,
    ) -> Verdict {
        let possible = self.model.since(key, oldest);
        let right = possible.iter().find(|version| match &version.page {
            Some(bytes) => !page.is_absent() && page.lsn() == version.lsn && bytes[..] == page[..],
            None => {
                page.is_absent()
                    && version.tells(page, self.watermark)
                    && page.iter().all(|&byte| byte == 0)
            }
        });
        if let Some(version) = right {
            self.counters.pages_read += 1;
            self.counters.pages_behind += u64::from(version.lsn < self.model.at(key, seen).lsn);
            self.visibility.gave(key, version.lsn);
            return Ok(());
        }
        let lsns: Vec<Lsn> = possible.iter().map(|version| version.lsn).collect();
        Err(format!(
            "{key:?} came at {:?}{} as {}; it may be one of {lsns:?}, of which the last is {}",
            page.lsn(),
            if page.is_absent() { " (absent)" } else { "" },
            self.model.whose(page),
            possible
                .last()
                .and_then(|v| v.page.as_deref())
                .map_or_else(|| "absent".into(), crate::testing::sim::model::describe),
        ))
    }

    pub(super) fn judge_error(
        &mut self,
        token: Token,
        pending: &PendingRequest,
        error: &Error,
    ) -> Verdict {
        let kind = error.kind();
        if pending.allocated.is_some() && kind != ErrorKind::OutcomeUnknown {
            return Err(format!(
                "it allocated {:?} and was refused with {kind:?}: {error}",
                pending.allocated
            ));
        }
        let Tolerance { io, full, read_pages_max, .. } = self.tolerance;
        let counters = &mut self.counters;
        let (counter, allowed) = match kind {
            ErrorKind::Conflict => {
                let changed = self.model.justifies_conflict(pending);
                counters.conflicts_held += u64::from(!changed);
                (
                    &mut counters.conflicts,
                    changed || self.visibility.justifies_conflict(token, pending),
                )
            }
            ErrorKind::Busy => (&mut counters.busy, true),
            ErrorKind::Full => {
                counters.spread_full += u64::from(pending.spread);
                (
                    &mut counters.full,
                    full && matches!(pending.what, Kind::Commit(_) | Kind::Checkpoint),
                )
            }
            ErrorKind::Invalid => (&mut counters.invalid, pending.what.is_wrong(read_pages_max)),
            ErrorKind::TooLarge => {
                (&mut counters.invalid, pending.what.may_be_too_large(&self.tolerance))
            }
            ErrorKind::Closed => (&mut counters.stopped, io || self.closing),
            ErrorKind::Io => (&mut counters.stopped, io),
            ErrorKind::OutcomeUnknown => (&mut counters.unknown, io),
            _ => (&mut counters.stopped, false),
        };
        *counter += 1;
        if allowed { Ok(()) } else { Err(format!("{kind:?} for no reason: {error}")) }
    }

    /// Checks the report of a recovery against what it had to find; returns the LSN that `pages`,
    /// which are all pages, show.
    ///
    /// It is the LSN reported, which is a commit that was allocated, or the state with which the
    /// life began.
    pub fn judge_state(
        &self,
        recovered_lsn: Lsn,
        clean: bool,
        pages: &[(PageKey, PageRef)],
    ) -> Result<Lsn, String> {
        if recovered_lsn < self.durable {
            return Err(format!(
                "recovered to {recovered_lsn:?}, although everything up to {:?} was said to be \
                 durable, by {}; allocated since {:?}: {:?}",
                self.durable,
                self.promise,
                self.began,
                self.allocated
                    .iter()
                    .map(|(lsn, changes)| (lsn, changes.len()))
                    .collect::<Vec<_>>(),
            ));
        }
        if self.closed && !clean {
            return Err("the store was closed cleanly and recovery says that it was not".into());
        }
        let judge = |recovered_lsn| {
            pages.iter().try_for_each(|(key, page)| self.judge_recovered(*key, recovered_lsn, page))
        };
        if recovered_lsn > self.last.max(self.newest) {
            return Err(format!(
                "recovered to {recovered_lsn:?}, although nothing above {:?} was allocated",
                self.newest
            ));
        }
        judge(recovered_lsn).map(|()| recovered_lsn)
    }

    /// Checks a page, read after recovery, against the model at the recovered LSN.
    pub fn judge_recovered(&self, key: PageKey, recovered_lsn: Lsn, page: &PageRef) -> Verdict {
        let version = self.model.at(key, recovered_lsn);
        let right = match &version.page {
            Some(bytes) => page.lsn() == version.lsn && bytes[..] == page[..],
            None => page.is_absent() && page.lsn() == Lsn::ZERO,
        };
        if right {
            return Ok(());
        }
        Err(format!(
            "after recovery to {recovered_lsn:?} (durable {:?}, last {:?}): {key:?} came at {:?} as \
             {}, expected at {:?} as {}, {}; its history: {:?}",
            self.durable,
            self.last,
            page.lsn(),
            self.model.whose(page),
            version.told(),
            version
                .page
                .as_deref()
                .map_or_else(|| "absent".into(), crate::testing::sim::model::describe),
            difference(page, version.page.as_deref()),
            self.history(key),
        ))
    }

    /// The changes of a page in this life, for messages.
    pub(super) fn history(&self, key: PageKey) -> Vec<(Lsn, String)> {
        let all = self
            .allocated
            .iter()
            .flat_map(|(lsn, changes)| changes.iter().map(move |change| (*lsn, change)));
        let of_page = all.filter(|(_, change)| change.0 == key);
        of_page
            .map(|(lsn, change)| (lsn, crate::testing::sim::model::describe_change(change)))
            .collect()
    }
}
