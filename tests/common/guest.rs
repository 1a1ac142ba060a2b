//! A small machine (QEMU, emulated) with an NVMe disk that is logged, polled if it shall be, or a
//! SCSI disk: this test program runs in it as `child`, on an ext4 file system, and is heard through
//! the serial console.

use super::logged::{DISK_BYTES, block_nodes, empty_disk, log_bytes};
use super::role::Role;
use super::surroundings::tool;
use super::{has_tool, run, scratch};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The guest's first process. What the kernel does not know of its command line is in the
/// environment.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin TMPDIR=/mnt
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
ulimit -l unlimited
for module in $GUEST_MODULES; do insmod "/$module.ko" || echo "$module can't be loaded"; done
while [ ! -e "/dev/$GUEST_DISK" ]; do sleep 0.1; done
queue="/sys/block/$GUEST_DISK/queue"
echo; echo "queue io_poll=$(cat $queue/io_poll) logical_block_size=$(cat $queue/logical_block_size) \
fua=$(cat $queue/fua) $(cat $queue/write_cache)"
mount -t tracefs none /sys/kernel/tracing && echo 1 > /sys/kernel/tracing/events/block/block_rq_issue/enable
(while sleep 2; do echo; echo "fua writes $(grep -c ' WF' /sys/kernel/tracing/trace)"; done) &
mount -t ext4 "/dev/$GUEST_DISK" /mnt || echo "the disk can't be mounted"
case "$GUEST_ROLE" in
  lib-tests) /bin/lib-tests --test-threads 2 io:: ;;
  *) COREPAGE_TEST_STORE=/mnt COREPAGE_TEST_ROLE="$GUEST_ROLE" COREPAGE_TEST_RUN="ring $GUEST_SHARDS" \
       /bin/program --exact nvme_guest::child --nocapture ;;
esac
echo "ended with $?"
echo; echo "kernel: $(dmesg | grep -i 'error, dev nvme' | head -n 1)"
umount /mnt
echo; echo dumped
sleep 1; poweroff -f
"#;

/// What the machine is like.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    pub block_bytes: u64,
    pub poll_queues: u64,
    pub shards: u16,
    pub disk: Disk,
}

/// The disk, and what becomes of a write before it is flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// No cache: QEMU flushes after each write. Slow, but true.
    Nvme,
    /// A volatile cache. QEMU's controller offers FUA and does not act on it: what the guest's
    /// kernel writes so is in the log without the flag and without a flush.
    NvmeWithCache,
    /// A volatile cache. QEMU flushes after a write with FUA.
    ScsiWithCache,
}

impl Disk {
    /// What the guest's kernel calls it, and the modules that it needs for it, in their order.
    fn in_guest(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Disk::Nvme | Disk::NvmeWithCache => ("nvme0n1", &[]),
            Disk::ScsiWithCache => ("sda", &MODULES),
        }
    }
}

/// Files beside the kernel.
const MODULES: [&str; 4] = ["scsi_common", "scsi_mod", "sd_mod", "virtio_scsi"];

pub struct Guest {
    pub dir: tempfile::TempDir,
    role: Role,
}

/// The kernel, which `scripts/nvme-guest` fetches; an ordinary test run fetches none, and ignores
/// these tests.
pub fn kernel() -> Option<PathBuf> {
    let kernel = std::env::var_os("COREPAGE_GUEST_KERNEL");
    let kernel =
        kernel.expect("scripts/nvme-guest runs these tests: it sets COREPAGE_GUEST_KERNEL");
    let tools = ["qemu-system-x86_64", "busybox", "cpio", "gzip", "strip", "mkfs.ext4", "ldd"];
    tools.iter().all(|name| has_tool(name)).then(|| kernel.into())
}

/// The guest's files: busybox, this program, the library's own tests if they are named, and what
/// they need. Made once, and kept in memory: a static is never dropped, so it would leave a
/// directory behind.
fn initramfs(kernel: &Path) -> &'static [u8] {
    static MADE: OnceLock<Vec<u8>> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = scratch("guest");
        let script = r#"
            mkdir -p r/bin r/proc r/sys r/dev r/mnt r/tmp && cp "$(command -v busybox)" r/bin/busybox
            for name in sh mount umount sleep cat poweroff echo dmesg grep head insmod; do ln -s busybox r/bin/$name; done
            strip -o r/bin/program "$1" && if [ -n "$2" ]; then strip -o r/bin/lib-tests "$2"; fi
            ldd "$1" | grep -o '/[^ ]*' | while read -r lib; do
              mkdir -p "r$(dirname "$lib")" && cp -L "$lib" "r$lib"
            done
            printf '%s' "$3" > r/init && chmod +x r/init
            shift 3 && cp "$@" r/
            cd r && find . | cpio --quiet -o -H newc | gzip -1 > ../initramfs"#;
        let mut make = Command::new("sh");
        make.args(["-e", "-c", script, "sh"]).arg(std::env::current_exe().expect("this program"));
        make.arg(std::env::var("COREPAGE_GUEST_LIB_TESTS").unwrap_or_default()).arg(INIT);
        make.args(MODULES.map(|module| kernel.with_file_name(format!("{module}.ko"))));
        run(make.current_dir(dir.path()));
        std::fs::read(dir.path().join("initramfs")).expect("the guest's files")
    })
}

impl Guest {
    /// Boots it with an empty file system on its disk.
    pub fn boot(kernel: &Path, machine: Machine, role: &str) -> Guest {
        let dir = scratch("nvme");
        empty_disk(dir.path());
        let ext4 = ["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0"];
        run(tool("mkfs.ext4").args(ext4).arg(dir.path().join("image")));
        std::fs::write(dir.path().join("initramfs"), initramfs(kernel))
            .expect("a copy of the guest's files");
        // The log begins with the file system made: this is the disk before its first entry.
        run(Command::new("cp")
            .arg("--sparse=always")
            .args(["image", "before"])
            .current_dir(dir.path()));
        let mut qemu = Command::new("qemu-system-x86_64");
        // Without CMPXCHG16B, which the kernel can do without: with QEMU 7.2 (Debian 12's) it
        // panicked in its allocator, right after that instruction and with flags that can't be, in
        // several starts of seven.
        qemu.args(
            "-accel tcg,thread=multi -cpu max,-cx16 -M q35 -m 1024 -smp 2 -nodefaults -nographic \
             -no-reboot"
                .split(' '),
        );
        qemu.args(["-serial", "stdio", "-kernel"])
            .arg(kernel)
            .arg("-initrd")
            .arg(dir.path().join("initramfs"));
        let Machine { block_bytes, poll_queues, shards, disk } = machine;
        let (name, modules) = disk.in_guest();
        qemu.arg("-append").arg(format!(
            "console=ttyS0,115200 quiet panic=-1 nvme.poll_queues={poll_queues} \
             nvme_core.multipath=N GUEST_ROLE={role} GUEST_SHARDS={shards} GUEST_DISK={name} \
             GUEST_MODULES=\"{}\"",
            modules.join(" ")
        ));
        qemu.args(block_nodes(dir.path()));
        // A named top, below which faults can be put while the guest runs.
        qemu.args(["-blockdev", "driver=raw,node-name=top,file=logged"]);
        qemu.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", dir.path().join("qmp").display()),
        ]);
        let blocks = format!("logical_block_size={block_bytes},physical_block_size={block_bytes}");
        let nvme =
            |cache| format!("nvme,drive=top,serial=x,max_ioqpairs=4,write-cache={cache},{blocks}");
        match disk {
            Disk::Nvme => qemu.args(["-device", &nvme("off")]),
            Disk::NvmeWithCache => qemu.args(["-device", &nvme("on")]),
            Disk::ScsiWithCache => {
                qemu.args(["-device", "virtio-scsi-pci", "-device"]);
                qemu.arg(format!("scsi-hd,drive=top,write-cache=on,dpofua=on,{blocks}"))
            }
        };
        let log = dir.path().to_owned();
        let role = Role::listen(qemu, move || log_bytes(&log));
        Guest { dir, role }
    }

    /// Until the child is ready.
    pub fn wait(&self) {
        self.role.wait();
    }

    /// The power goes. All that was heard, with the length of the log at that time.
    pub fn cut(self) -> (tempfile::TempDir, Vec<(u64, String)>) {
        (self.dir, self.role.kill_stamped())
    }
}

const _: () = assert!(DISK_BYTES.is_multiple_of(4096));
