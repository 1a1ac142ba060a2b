//! Other people's NBD clients against the real server: fio, qemu, libnbd, and a file system client
//! over nbdfuse.
//!
//! If these fail, a user's tool reads other bytes than it wrote, or takes the store for a broken
//! disk.

// Real processes take real time; nothing here is replayed from a seed but the data.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::{Rng, Served, has_fuse, has_tool, run, scratch, skip};
use futures_lite::future::block_on;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn serve(dir: &Path, size: &str) -> Served {
    Served::start_with(dir, &["--nbd", "tcp:127.0.0.1:0", "--volume", "vol", "--size", size])
}

fn uri(served: &Served) -> String {
    format!("nbd://{}/vol", served.address())
}

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Random writes of 4 to 64 KiB with a sum in each block, by two jobs, each in a part of its own,
/// and then read back.
fn fio(served: &Served, depth: u32, more: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command.args([
        "--name=verify",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--size=24m",
        "--numjobs=2",
    ]);
    command.args([
        "--offset_increment=24m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--end_fsync=1",
        "--group_reporting",
    ]);
    command.arg(format!("--iodepth={depth}")).arg(format!("--uri={}", uri(served))).args(more);
    command
}

#[test]
fn fio_finds_what_it_wrote_at_every_depth_and_after_a_kill() {
    if !has_tool("fio") {
        return;
    }
    let engines =
        String::from_utf8_lossy(&output(Command::new("fio").arg("--enghelp")).stdout).into_owned();
    if !engines.contains("nbd") && !skip("this fio has no engine nbd") {
        return;
    }
    let dir = scratch("fio");
    let mut served = serve(dir.path(), "256M");
    for depth in [1, 32, 128] {
        run(&mut fio(&served, depth, &["--do_verify=0"]));
        // Another one writes elsewhere when the server is killed: all that the first one flushed
        // must be there.
        let mut other = fio(&served, 32, &["--offset=128m", "--do_verify=0", "--loops=100"]);
        let mut other =
            other.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("fio starts");
        std::thread::sleep(Duration::from_millis(400));
        served.kill();
        assert!(
            !other.wait().expect("it is ours").success(),
            "its server was killed, and it did not notice"
        );
        served = serve(dir.path(), "256M");
        run(&mut fio(&served, depth, &["--verify_only"]));
    }
    run(&mut fio(&served, 32, &["--do_verify=1", "--verify_async=2"]));
    assert!(served.stop().success());
}

/// An image with data, holes, and zeros that are data, which no page boundary divides.
fn image(path: &Path, bytes: u64) {
    let mut file = File::create(path).expect("an image");
    let mut rng = Rng::of(&[3]);
    let mut at = 5 * MIB + 700;
    while at < bytes - 3 * MIB {
        let length = 1 + rng.below(MIB);
        file.seek(SeekFrom::Start(at)).expect("it can be long");
        file.write_all(&rng.bytes(length as usize)).expect("room for an image");
        at += length + rng.below(4 * MIB);
    }
    file.set_len(bytes).expect("it can be long");
}

#[test]
fn qemu_img_brings_an_image_in_and_out_unchanged() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let dir = scratch("qemu");
    let served = serve(&dir.path().join("store"), "128M");
    let (image_path, out) = (dir.path().join("image"), dir.path().join("out"));
    image(&image_path, 128 * MIB);
    let convert = |from: &str, to: &str, more: &[&str]| {
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "raw"])
            .args(more)
            .args([from, to]));
    };
    let (image_path, out) = (image_path.to_str().expect("UTF-8"), out.to_str().expect("UTF-8"));
    convert(image_path, &uri(&served), &["-n", "-W", "-m", "8"]);
    run(Command::new("qemu-img").args([
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        image_path,
        &uri(&served),
    ]));
    convert(&uri(&served), out, &[]);
    run(Command::new("cmp").args([image_path, out]));
    let compare = |pattern: &str| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]);
        for step in pattern.split(';') {
            command.args(["-c", step.trim()]);
        }
        let output = output(command.arg(uri(&served)));
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("failed"), "{pattern}: {said}");
    };
    compare("write -P 0x5a 4096 65536; read -P 0x5a 4096 65536; flush");
    compare("write -P 0xa5 1000 3000; read -P 0xa5 1000 3000; read -P 0x5a 4096 61440");
    compare(
        "write -z 8192 16384; read -P 0 8192 16384; read -P 0x5a 4096 4096; read -P 0x5a 24576 \
         4096",
    );
    compare("discard 0 33554432; read -P 0 0 33554432");
    compare(
        "write -z -u 0 67108864; read -P 0 0 67108864; writev -P 7 4096 4096 512 512; read -P 7 \
         4096 5120; read -P 0 9216 5000",
    );
    compare(
        "aio_write -P 9 0 1M; aio_write -P 8 1M 1M; aio_flush; read -P 9 0 1M; read -P 8 1M 1M; \
         flush",
    );
    let refused = output(Command::new("qemu-img").args([
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        image_path,
        &uri(&served),
    ]));
    assert_eq!(refused.status.code(), Some(1), "they differ by now");
    assert!(served.stop().success());
}

/// The line that the server prints is what an operator pastes into a client: with a raw space or
/// `&` in it clients refuse it, or connect elsewhere.
#[test]
fn clients_take_the_uri_that_is_printed_whatever_the_socket_is_called() {
    if !has_tool("nbdinfo") {
        return;
    }
    let dir = scratch("uri");
    for name in ["a b", "50%25", "x#y&z", "say \"ü\"", "a+b?c=d"] {
        let nbd = format!("unix:{}", dir.path().join(name).display());
        let served = Served::start_with(
            &dir.path().join("store"),
            &["--nbd", &nbd, "--volume", "vol", "--size", "64M"],
        );
        let told = output(Command::new("nbdinfo").args(["--size", &served.uris[0]]));
        assert_eq!(
            String::from_utf8_lossy(&told.stdout).trim(),
            "67108864",
            "{}: {told:?}",
            served.uris[0]
        );
        assert_eq!(common::nbd::Client::go(&served.address(), "vol").bytes, 64 << 20);
        assert!(served.stop().success());
    }
}

/// A store with many volumes could not be listed by the tool that people list exports with.
#[test]
fn nbdinfo_lists_as_many_volumes_as_a_store_can_have() {
    if !has_tool("nbdinfo") {
        return;
    }
    const VOLUMES: usize = 247;
    let dir = scratch("list");
    let options = corepage::Options { memory_bytes: 32 << 20, ..corepage::Options::default() };
    let store = block_on(corepage::Store::open(dir.path(), options)).expect("a store");
    for n in 0..VOLUMES {
        block_on(store.create_volume(&format!("volume-{n}"), (1 + n as u64) << 20))
            .expect("a volume");
    }
    block_on(store.close()).expect("it closes");
    drop(store);
    // Over TCP libnbd takes 200 ms for each export, with any server.
    let served = Served::start_with(
        dir.path(),
        &["--nbd", &format!("unix:{}", dir.path().join("s").display())],
    );
    let told = output(Command::new("nbdinfo").args(["--list", "--json", &served.uris[0]]));
    assert!(told.status.success(), "{told:?}");
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let exports = told["exports"].as_array().expect("a list");
    let mut sizes: Vec<u64> =
        exports.iter().map(|e| e["export-size"].as_u64().expect("a size") >> 20).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, (1..=VOLUMES as u64).collect::<Vec<_>>());
    assert!(served.stop().success());
}

/// Stretches of an export by libnbd: offset, length, and whether it is a hole.
fn map(served: &Served) -> Vec<(u64, u64, bool)> {
    let said = output(Command::new("nbdinfo").args(["--map", "--json", &uri(served)]));
    assert!(said.status.success(), "{said:?}");
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).expect("JSON");
    let number = |entry: &serde_json::Value, name: &str| entry[name].as_u64().expect("a number");
    let entries = said.as_array().expect("a list").iter();
    entries
        .map(|e| (number(e, "offset"), number(e, "length"), number(e, "type") & 1 == 1))
        .collect()
}

#[test]
fn libnbd_sees_holes_and_data_as_they_are_and_keeps_them() {
    if !has_tool("nbdinfo") || !has_tool("nbdcopy") {
        return;
    }
    let dir = scratch("libnbd");
    let served = serve(&dir.path().join("store"), "128M");
    assert_eq!(map(&served), [(0, 128 * MIB, true)]);
    let mut client = common::nbd::Client::go(&served.address(), "vol");
    client.write(0, 8192, &[1; 4096]);
    client.write(0, 10 * MIB + 5, &[1; 5]);
    let page = 4096;
    let ends = [0, 2 * page, 3 * page, 10 * MIB, 10 * MIB + page, 128 * MIB];
    let expected: Vec<_> = ends
        .windows(2)
        .zip([true, false].iter().cycle())
        .map(|(at, hole)| (at[0], at[1] - at[0], *hole))
        .collect();
    assert_eq!(map(&served), expected);
    let (image_path, out) = (dir.path().join("image"), dir.path().join("out"));
    image(&image_path, 128 * MIB);
    let copy =
        |from: &Path, to: &Path| run(Command::new("nbdcopy").arg("--flush").args([from, to]));
    let here = uri(&served);
    copy(&image_path, Path::new(&here));
    copy(Path::new(&here), &out);
    run(Command::new("cmp").args([&image_path, &out]));
    let stored = |path: &Path| fs::metadata(path).expect("it is there").blocks() * 512;
    let data: u64 =
        map(&served).iter().filter(|(_, _, hole)| !hole).map(|(_, length, _)| length).sum();
    assert!(
        data <= stored(&image_path) + 4 * MIB,
        "{data} bytes are stored, {} in the image",
        stored(&image_path)
    );
    assert!(
        stored(&out) <= stored(&image_path) + 4 * MIB,
        "a copy of {} bytes has {}",
        stored(&image_path),
        stored(&out)
    );
    assert!(served.stop().success());
}

/// Unmounts when it is dropped.
struct Mounted<'a>(Child, &'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fusermount3").arg("-u").arg(self.1).status();
        let _ = self.0.wait();
    }
}

/// Mounts the volume as the file `disk` in `at`, and waits until it is there.
fn mount<'a>(served: &Served, at: &'a Path) -> Mounted<'a> {
    let mut nbdfuse = Command::new("nbdfuse");
    nbdfuse.arg(at.join("disk")).arg(uri(served)).stdin(Stdio::null()).stderr(Stdio::null());
    let mounted = Mounted(nbdfuse.spawn().expect("nbdfuse starts"), at);
    let begun = Instant::now();
    while File::open(at.join("disk")).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it is not mounted");
        std::thread::sleep(Duration::from_millis(20));
    }
    mounted
}

fn has_nbdfuse() -> bool {
    has_fuse() && has_tool("nbdfuse") && has_tool("fusermount3")
}

/// `fsx`, as it is on crates.io: reads, writes, mapped reads and writes, syncs, held against its
/// own model.
#[test]
fn fsx_finds_nothing_over_nbdfuse() {
    let fsx = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|d| d.join("fsx")).find(|f| f.exists()));
    let Some(fsx) = fsx else {
        // `scripts/check` builds it where it can, and says so where it can't.
        return common::skipped("there is no fsx (cargo install fsx)");
    };
    if !has_nbdfuse() {
        return;
    }
    let dir = scratch("fsx");
    let at = dir.path().join("mount");
    fs::create_dir(&at).expect("a place to mount at");
    let plan = "blockmode = true\nflen = 67108864\n[opsize]\nmax = 131072\n[weights]\ntruncate = \
                0\npunch_hole = 0\nposix_fallocate = 0\ncopy_file_range = 0\nsendfile = 0\nfsync \
                = 1\nfdatasync = 1\nread = 10\nwrite = 10\nmapread = 5\nmapwrite = 5\ninvalidate \
                = 1\n";
    fs::write(dir.path().join("plan"), plan).expect("a plan");
    let served = serve(&dir.path().join("store"), "64M");
    let mounted = mount(&served, &at);
    for seed in ["1", "2"] {
        let mut command = Command::new(&fsx);
        command.current_dir(dir.path()).args([
            "-q",
            "-f",
            "plan",
            "-P",
            ".",
            "-N",
            "2000",
            "-S",
            seed,
            "mount/disk",
        ]);
        run(&mut command);
    }
    drop(mounted);
    assert!(served.stop().success());
}

/// What fsx does, but for changes of length, which a disk does not have: random reads and writes of
/// a file, held against a model, with syncs and holes in between, and the server killed after one
/// of the syncs.
#[test]
fn a_file_over_nbdfuse_holds_what_was_written_to_it() {
    if !has_nbdfuse() {
        return;
    }
    let dir = scratch("nbdfuse");
    let (store, at) = (dir.path().join("store"), dir.path().join("mount"));
    fs::create_dir(&at).expect("a place to mount at");
    let mut rng = Rng::of(&[11]);
    let mut model = vec![0; 8 * MIB as usize];
    for life in 0..2 {
        let served = serve(&store, "8M");
        let mounted = mount(&served, &at);
        let file =
            OpenOptions::new().read(true).write(true).open(at.join("disk")).expect("it is mounted");
        assert_eq!(file.metadata().expect("it is a file").len(), 8 * MIB);
        let mut all = vec![1; model.len()];
        file.read_exact_at(&mut all, 0).expect("it can be read");
        assert!(all == model, "life {life} begins with other bytes");
        for step in 0..2000 {
            let longest = [8, 5000, 200_000][rng.below(3) as usize];
            let length = 1 + rng.below(longest) as usize;
            let offset = rng.below((model.len() - length) as u64) as usize;
            match rng.below(20) {
                0..9 => {
                    let bytes = rng.bytes(length);
                    file.write_all_at(&bytes, offset as u64).expect("it can be written");
                    model[offset..][..length].copy_from_slice(&bytes);
                }
                9 => file.sync_data().expect("it can be flushed"),
                10 => {
                    // Kernels and nbdfuse of some versions can't: then it was not done.
                    let how = rustix::fs::FallocateFlags::PUNCH_HOLE
                        | rustix::fs::FallocateFlags::KEEP_SIZE;
                    if rustix::fs::fallocate(&file, how, offset as u64, length as u64).is_ok() {
                        model[offset..][..length].fill(0);
                    }
                }
                _ => {
                    let mut bytes = vec![1; length];
                    file.read_exact_at(&mut bytes, offset as u64).expect("it can be read");
                    assert!(
                        bytes == model[offset..][..length],
                        "step {step}: {length} bytes at {offset}"
                    );
                }
            }
        }
        file.sync_all().expect("it can be flushed");
        drop(file);
        if life == 0 {
            served.kill();
            drop(mounted);
        } else {
            drop(mounted);
            assert!(served.stop().success());
        }
    }
}
