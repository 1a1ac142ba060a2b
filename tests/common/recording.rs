//! One life of a store on a logged disk, and what is there of it when the power goes at points of
//! the log.

use super::Rng;
use super::history::{ALL_CELLS, Cell, PAGE, Said, check_known, place};
use super::replay::{Log, Rebuilt, SECTOR, Subset};
use super::role::Run;
use super::surroundings::Mounted;
use corepage::{Error, ErrorKind, Store};
use futures_lite::future::block_on;
use std::ops::AddAssign;
use std::path::Path;

/// What one life of a store left: the disk's log, and what was said at which length of it.
pub struct Recording {
    pub kind: &'static str,
    pub disk: Rebuilt,
    pub lines: Vec<(u64, String)>,
    pub all: Said,
    /// Entries when the store was ready.
    pub ready: usize,
}

/// What was gone through.
#[derive(Debug, Default)]
pub struct Counts {
    pub states: u64,
    pub unflushed: u64,
    pub there: u64,
    pub required: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Counts) {
        self.states += more.states;
        self.unflushed += more.unflushed;
        self.there += more.there;
        self.required += more.required;
    }
}

impl Recording {
    /// Of a child that was heard, and the disk as it was `before` the log.
    pub fn new(
        kind: &'static str,
        log: &Path,
        before: &Path,
        lines: Vec<(u64, String)>,
    ) -> Option<Recording> {
        let log = Log::open(log).expect("a log");
        let heard = lines.iter().find(|(_, line)| line == "ready").expect("it was ready").0;
        let ready = log.entries.partition_point(|entry| entry.end < heard) + 1;
        let all = Said::parse(lines.iter().map(|(_, line)| line));
        let disk = Rebuilt::new(log, before)?;
        Some(Recording { kind, disk, lines, all, ready })
    }

    pub fn end(&self) -> usize {
        self.disk.log.entries.len()
    }

    /// Points in order: between flushes, and just before and after one.
    fn points(&self, count: u64, rng: &mut Rng) -> Vec<usize> {
        let ready = self.ready.min(self.end());
        let mut any = || ready + rng.below((self.end() - ready) as u64 + 1) as usize;
        let mut points: Vec<usize> = (0..count).map(|_| any()).collect();
        for (n, point) in points.iter_mut().enumerate().filter(|(n, _)| n % 2 == 0) {
            let flush = self.disk.log.entries[*point..].iter().position(|entry| entry.flushes());
            *point += flush.map_or(0, |flush| flush + n / 2 % 2);
        }
        points.sort_unstable();
        points
    }

    /// The lines that had been heard when the log had `end` entries.
    pub fn known(&self, end: usize) -> Said {
        let length = self.disk.log.entries[..end].last().map_or(0, |entry| entry.end);
        Said::parse(self.lines.iter().filter(|(at, _)| *at <= length).map(|(_, line)| line))
    }

    /// Mounts this image and holds what the store has against what was `known`. How many
    /// transactions are there.
    pub fn examine(&self, image: &Path, known: &Said, run: Run) -> Result<u64, String> {
        let options = if self.kind == "xfs" { "loop,nouuid" } else { "loop" };
        let mounted = Mounted::try_file(self.kind, options, image)?;
        let (found, cut) =
            block_on(read(&mounted.path().join("store"), run)).map_err(|e| e.to_string())?;
        let base = vec![Cell { lsn: 0, bytes: vec![0; PAGE] }; ALL_CELLS as usize];
        check_known(&base, &self.all, known, &found, cut).map(|counts| counts.there)
    }

    pub fn replay(&mut self, states: u64, step: u64, rng: &mut Rng) -> Counts {
        let mut counts = Counts::default();
        for (n, end) in self.points(states, rng).into_iter().enumerate() {
            // ext4 can't always be mounted after a torn block of its own.
            let piece = if self.kind == "xfs" { SECTOR } else { 4096 };
            let subset = Subset::by(rng, piece);
            let (image, unflushed) = self.disk.at(end, subset, rng);
            let known = self.known(end);
            let run = Run::of_step(step + n as u64);
            match self.examine(&image, &known, run) {
                Ok(there) => counts.there += there,
                Err(e) => {
                    let kept = std::env::temp_dir().join(format!("corepage-replay-{}", self.kind));
                    let kept = std::fs::copy(&image, &kept)
                        .map_or("nowhere".into(), |_| kept.display().to_string());
                    panic!(
                        "{}, {end} of {} entries, {subset:?}, {run:?}: {e} (kept: {kept})",
                        self.kind,
                        self.end()
                    )
                }
            }
            std::fs::remove_file(&image).expect("the image goes");
            counts.states += 1;
            counts.unflushed += unflushed as u64;
            counts.required += known.acknowledged().0.len() as u64;
        }
        counts
    }
}

async fn read(dir: &Path, run: Run) -> corepage::Result<(Vec<Cell>, u64)> {
    let store = Store::open(dir, run.options()).await?;
    let Some(volume) = store.volume("cells").await? else {
        return Err(Error::new(
            ErrorKind::NotFound,
            "the volume, which was there before the first point, is gone",
        ));
    };
    let ids: Vec<_> = (0..ALL_CELLS).map(place).collect();
    let pages = volume.read_many(&ids).await?;
    let found =
        pages.iter().map(|page| Cell { lsn: page.lsn().get(), bytes: page.to_vec() }).collect();
    let cut = store.recovery().recovered_lsn.get();
    store.close().await?;
    Ok((found, cut))
}
