// Command etcd is the cluster's store. A main of our own, because the upstream
// package would be built under the name "v3".
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
