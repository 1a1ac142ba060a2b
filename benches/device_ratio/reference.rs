//! What the device gives without the engine: fio, and a bare write with a flush.

use crate::report::{Sample, median};
use crate::{PAGE, Plan};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Processor time that this process has used, user and kernel.
pub fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Bytes that this process has read from devices, and written to them.
pub fn device_bytes() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let of =
        |name| text.lines().find_map(|line| line.strip_prefix(name)?.parse().ok()).unwrap_or(0);
    (of("read_bytes: "), of("write_bytes: "))
}

/// fio with a file of which every block has been written.
pub struct Fio {
    path: PathBuf,
    time: Duration,
    core: usize,
    alone: bool,
}

impl Fio {
    /// A file of as many pages, written twice: first writes are another world.
    pub fn new(plan: &Plan, pages: u64) -> Fio {
        let path = plan.dir.join(format!("fio-{pages}"));
        let fio = Fio { path, time: plan.time, core: plan.core, alone: plan.alone };
        if plan.alone || fio.path.exists() {
            return fio;
        }
        let mut file = File::create(&fio.path).expect("a file is made");
        let chunk = vec![0x5a; 1 << 20];
        for _ in 0..(pages * PAGE as u64) >> 20 {
            file.write_all(&chunk).expect("a file is written");
        }
        file.sync_all().expect("a file is flushed");
        drop(file);
        fio.run(&["--rw=write", "--bs=1M", "--iodepth=16"], "write");
        fio
    }

    fn run(&self, arguments: &[&str], side: &str) -> Option<Sample> {
        let output = Command::new("fio")
            .args([
                "--name=x",
                "--ioengine=io_uring",
                "--direct=1",
                "--output-format=json",
                "--randrepeat=0",
            ])
            .args(["--norandommap", "--gtod_reduce=0"])
            .arg(format!("--cpus_allowed={}", self.core))
            .arg(format!("--filename={}", self.path.display()))
            .args(arguments)
            .output()
            .ok()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let job = &report["jobs"][0];
        let percentile =
            |p: &str| job[side]["clat_ns"]["percentile"][p].as_f64().unwrap_or(0.0) / 1e3;
        let rate = job[side]["iops"].as_f64()?;
        let cpu = (job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?) / 100.0;
        Some(Sample {
            rate,
            p50_us: percentile("50.000000"),
            p99_us: percentile("99.000000"),
            cpu_us: cpu * 1e6 / rate,
        })
    }

    /// 4 KiB at random places: `randread` or `randwrite`. Nothing if there is no fio.
    pub fn random(&self, kind: &str, depth: u64) -> Option<Sample> {
        if self.alone {
            return None;
        }
        let side = if kind == "randread" { "read" } else { "write" };
        let (kind, depth) = (format!("--rw={kind}"), format!("--iodepth={depth}"));
        self.run(
            &[
                &kind,
                &depth,
                "--bs=4k",
                "--time_based",
                &format!("--runtime={}ms", self.time.as_millis()),
            ],
            side,
        )
    }
}

/// A file of zeros, all of it written twice.
pub fn bare_file(path: &Path) -> File {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    for _ in 0..2 {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .expect("a file is made");
        file.write_all(&vec![0; 16 << 20]).expect("a file is written");
        file.sync_all().expect("a file is flushed");
    }
    OpenOptions::new()
        .write(true)
        .custom_flags(direct)
        .open(path)
        .expect("the file system takes direct I/O")
}

/// A direct write of one block and an fdatasync, one pair after another, through the whole file. On
/// the thread that calls.
pub fn bare_latency(file: &File, commits: usize) -> Sample {
    let memory = vec![0u8; 2 * PAGE];
    let skip = memory.as_ptr().align_offset(PAGE);
    let block = &memory[skip..skip + PAGE];
    let (start, cpu) = (Instant::now(), processor_time());
    let mut times = Vec::with_capacity(commits);
    for n in 0..commits {
        let begun = Instant::now();
        file.write_all_at(block, (n % 4096 * PAGE) as u64).expect("a block is written");
        file.sync_data().expect("the file is flushed");
        times.push(begun.elapsed().as_nanos() as u32);
    }
    sample(times, start.elapsed(), processor_time() - cpu)
}

/// From the latencies, in nanoseconds, of all operations of a measurement.
pub fn sample(mut times: Vec<u32>, took: Duration, cpu: Duration) -> Sample {
    let count = times.len().max(1);
    let at = |times: &mut Vec<u32>, share: f64| -> f64 {
        if times.is_empty() {
            return f64::NAN;
        }
        let n = ((times.len() - 1) as f64 * share) as usize;
        f64::from(*times.select_nth_unstable(n).1) / 1e3
    };
    Sample {
        rate: times.len() as f64 / took.as_secs_f64(),
        p50_us: at(&mut times, 0.5),
        p99_us: at(&mut times, 0.99),
        cpu_us: cpu.as_secs_f64() * 1e6 / count as f64,
    }
}

/// The best of some samples, by rate.
pub fn best(samples: impl IntoIterator<Item = Sample>) -> Option<Sample> {
    samples.into_iter().max_by(|a, b| a.rate.total_cmp(&b.rate))
}

/// The median of values of some samples.
pub fn middle(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> f64 {
    median(samples.iter().map(value).collect())
}
