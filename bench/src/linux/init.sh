#!/bin/busybox sh
# The Linux guest of the bench: it does the steps in /bench/steps one after the other, each a line of the shell, and says on
# its console what came of each. The bench reads the lines that begin with its mark.
export PATH=/bin:/sbin HOME=/
say() { echo "ringvm-guest: $*"; }
end() {
    if grep -q bench.end=reboot /proc/cmdline; then reboot -f; else poweroff -f; fi
    while :; do sleep 1; done
}
fail() {
    say "FAILED: $*"
    sleep 1
    end
}
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /run /tmp
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
while read -r module; do
    insmod "$module" 2>/run/err || fail "loading $module: $(cat /run/err)"
done < /modules/order
await() {
    tries=0
    until [ -e "$1" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || fail "there is no $2: does the kernel have the drivers virtio_pci and $3, or --modules?"
        sleep 0.1
    done
}
[ ! -e /bench/disk ] || await /sys/block/vda "disk /dev/vda" virtio_blk
if [ -e /bench/address ]; then
    await /sys/class/net/eth0 "NIC eth0" virtio_net
    { ip link set lo up && ip link set eth0 up && ip addr add "$(cat /bench/address)" dev eth0; } 2>/run/err ||
        fail "giving eth0 its address: $(cat /run/err)"
fi
# From here on the console is the bench's.
dmesg -n 1
echo
say "up Linux $(uname -r)"
cd /run || fail "/run is missing"
for step in /bench/steps/*; do
    say "start"
    sh "$step" >/run/out 2>/run/err </dev/null
    say "end $?"
    { sed 's/^[ 	]*/ringvm-guest: |/' /run/out; echo; } | grep '|.'
    tail -n 3 /run/err | sed 's/^/ringvm-guest: !/'
    say "close"
done
say "done"
end
