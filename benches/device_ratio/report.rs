//! What was measured: a line of JSON for each row as soon as it is there, and one table at the end.

use crate::Plan;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One measurement.
#[derive(Clone, Copy, Default, Debug)]
pub struct Sample {
    /// Operations a second.
    pub rate: f64,
    /// Latency, in microseconds.
    pub p50_us: f64,
    /// The same.
    pub p99_us: f64,
    /// Processor time of an operation, user and kernel, in microseconds.
    pub cpu_us: f64,
}

/// What is compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Thousands a second.
    Rate,
    /// Microseconds, half of all.
    P50,
    /// Percent of a core.
    Percent,
}

/// What is asked for.
#[derive(Clone, Copy)]
pub enum Target {
    /// Of the reference, at least.
    RatioMin(f64),
    /// Of the reference, at most.
    RatioMax(f64),
    /// At least.
    Min(f64),
    /// Less.
    Below(f64),
    /// For comparison only.
    Nothing,
}

/// One line of the table.
pub struct Row {
    /// What was done.
    pub what: String,
    /// By the engine, a sample for each round.
    pub engine: Vec<Sample>,
    /// By the reference; none without one.
    pub reference: Vec<Sample>,
    /// What is compared.
    pub measure: Measure,
    /// What is asked for.
    pub target: Target,
    /// What else there is to say.
    pub note: String,
}

/// The middle one; of an even number, the higher of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn median_of(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> f64 {
    median(samples.iter().map(value).collect())
}

impl Row {
    fn figure(&self, samples: &[Sample]) -> Option<f64> {
        let value = |sample: &Sample| match self.measure {
            Measure::Rate => sample.rate / 1e3,
            Measure::P50 => sample.p50_us,
            Measure::Percent => sample.rate,
        };
        (!samples.is_empty()).then(|| median_of(samples, value))
    }

    fn unit(&self) -> &'static str {
        match self.measure {
            Measure::Rate => "k/s",
            Measure::P50 => "us",
            Measure::Percent => "%",
        }
    }

    /// Of the engine's figure to the reference's.
    fn ratio(&self) -> Option<f64> {
        Some(self.figure(&self.engine)? / self.figure(&self.reference)?)
    }

    fn target(&self) -> String {
        match self.target {
            Target::RatioMin(x) => format!(">= {x} x"),
            Target::RatioMax(x) => format!("<= {x} x"),
            Target::Min(x) => format!(">= {x} {}", self.unit()),
            Target::Below(x) => format!("< {x} {}", self.unit()),
            Target::Nothing => String::new(),
        }
    }

    fn met(&self) -> Option<bool> {
        let engine = self.figure(&self.engine)?;
        match self.target {
            Target::RatioMin(x) => Some(self.ratio()? >= x),
            Target::RatioMax(x) => Some(self.ratio()? <= x),
            Target::Min(x) => Some(engine >= x),
            Target::Below(x) => Some(engine < x),
            Target::Nothing => None,
        }
    }

    fn json(&self) -> Value {
        let samples = |samples: &[Sample]| -> Vec<Value> {
            let one = |s: &Sample| {
                json!({
                    "rate": s.rate, "p50_us": s.p50_us, "p99_us": s.p99_us, "cpu_us": s.cpu_us,
                })
            };
            samples.iter().map(one).collect()
        };
        json!({
            "workload": self.what, "unit": self.unit(), "engine": self.figure(&self.engine),
            "reference": self.figure(&self.reference), "ratio": self.ratio(),
            "target": self.target(), "met": self.met(), "note": self.note,
            "engine_rounds": samples(&self.engine), "reference_rounds": samples(&self.reference),
        })
    }
}

/// The report of a run.
pub struct Report {
    rows: Vec<Row>,
    file: File,
    path: PathBuf,
    small: bool,
}

fn first_line(path: &str, prefix: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(prefix)).unwrap_or_default();
    line.split_once(": ").map_or(line, |(_, value)| value).to_string()
}

fn output(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// The three averages.
fn load() -> String {
    first_line("/proc/loadavg", "").split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn commit() -> String {
    let Some(commit) = output("git", &["rev-parse", "--short", "HEAD"]) else {
        return "unknown".into();
    };
    let changed =
        output("git", &["status", "--porcelain"]).is_some_and(|changes| !changes.is_empty());
    if changed { format!("{commit} and changes") } else { commit }
}

impl Report {
    /// Says what this is.
    pub fn begin(plan: &Plan, small: bool) -> Report {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("device_ratio.jsonl");
        let file = File::create(&path).expect("the results can be written");
        let mut report = Report { rows: Vec::new(), file, path, small };
        let machine =
            format!("{}, {} cores", first_line("/proc/cpuinfo", "model name"), plan.shards);
        let kernel = format!("Linux {}", first_line("/proc/sys/kernel/osrelease", ""));
        let dir = plan.dir.display().to_string();
        let files = output("stat", &["-f", "-c", "%T", &dir]).unwrap_or_default();
        let fio = output("fio", &["--version"]).unwrap_or_else(|| "no fio".into());
        let head =
            format!("{machine}; {kernel}; {files}; {fio}; commit {}; load {}", commit(), load());
        println!(
            "{head}\n{} rounds of {} ms; {} pages, hot {}",
            plan.rounds,
            plan.time.as_millis(),
            plan.pages,
            plan.hot_pages
        );
        let busy = load()
            .split(' ')
            .next()
            .and_then(|load| load.parse().ok())
            .is_some_and(|load: f64| load > 0.7);
        if busy && !small {
            println!("THE MACHINE IS BUSY: these figures are not of the engine alone");
        }
        report.line(&json!({
            "machine": machine, "kernel": kernel, "file_system": files, "fio": fio,
            "commit": commit(), "load": load(),
            "rounds": plan.rounds, "ms": plan.time.as_millis() as u64,
            "pages": plan.pages, "hot_pages": plan.hot_pages,
            "small": small, "core": plan.core, "shards": plan.shards,
        }));
        report
    }

    fn line(&mut self, value: &Value) {
        writeln!(self.file, "{value}").expect("the results can be written");
    }

    /// Rows of one workload.
    pub fn add(&mut self, rows: Vec<Row>) {
        for row in rows {
            self.line(&row.json());
            eprintln!(
                "  {}: {:.1} {}",
                row.what,
                row.figure(&row.engine).unwrap_or(f64::NAN),
                row.unit()
            );
            self.rows.push(row);
        }
    }

    /// Medians as `scripts/record` takes them: name, unit, median, runs, the reference's median.
    pub fn rows(&self) -> String {
        let line = |row: &Row| {
            let median = row.figure(&row.engine)?;
            let (name, unit, runs) = (&row.what, row.unit(), row.engine.len());
            let reference = row.figure(&row.reference);
            let reference = reference.map_or(String::new(), |median| format!("{median:.3}"));
            Some(format!("{name}\t{unit}\t{median:.3}\t{runs}\t{reference}\n"))
        };
        self.rows.iter().filter_map(line).collect()
    }

    /// The table.
    pub fn end(self) {
        println!(
            "\n{:<46} {:>10} {:>10} {:>6}  {:<10} {:<7} {:>8} {:>8}  {:>13} {:>13}",
            "medians",
            "engine",
            "reference",
            "ratio",
            "target",
            "",
            "P50 us",
            "P99 us",
            "CPU us/op",
            "reference's"
        );
        let shown = |value: Option<f64>| {
            value.filter(|v| v.is_finite()).map_or_else(|| "-".into(), |v| format!("{v:.1}"))
        };
        for row in &self.rows {
            let met = match row.met() {
                _ if self.small => "",
                Some(true) => "met",
                Some(false) => "MISSED",
                None => "",
            };
            let of = |samples: &[Sample], value: fn(&Sample) -> f64| {
                let value = median_of(samples, value);
                shown((value > 0.0).then_some(value))
            };
            println!(
                "{:<46} {:>10} {:>10} {:>6}  {:<10} {met:<7} {:>8} {:>8}  {:>13} {:>13}  {}",
                row.what,
                format!("{} {}", shown(row.figure(&row.engine)), row.unit()),
                shown(row.figure(&row.reference)),
                row.ratio().map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}")),
                row.target(),
                of(&row.engine, |s| s.p50_us),
                of(&row.engine, |s| s.p99_us),
                of(&row.engine, |s| s.cpu_us),
                of(&row.reference, |s| s.cpu_us),
                row.note,
            );
        }
        println!(
            "load at the end {}; all data verified; every round as JSON in {}",
            load(),
            self.path.display()
        );
    }
}
